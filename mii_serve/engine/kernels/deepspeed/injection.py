"""Puts DeepSpeed's transformer blocks into a UNet, by DeepSpeed's own `generic_injection`.

It expects a whole pipeline, for whose text encoder its code no longer fits today's transformers. So it gets a stand-in with an
empty text encoder, and of the result we keep the UNet, whose blocks it has replaced in place. Five faults in the new blocks are
then corrected; each would otherwise give wrong pictures or a slow call (`docs/architecture/07-deepspeed.md`).

DeepSpeed is imported here and not before: it is an extra.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from mii_serve.errors import UnusableEngineError

logger = logging.getLogger(__name__)

FLASH_BLOCK = 64
"""Tokens of a block of DeepSpeed's Triton kernel, which reads and writes whole blocks wherever the tensors end."""

NEVER_ALLOCATES = 1
"""A `layer_id` other than 0. Layer 0 allocates the workspace in every call; `workspace.py` has allocated it once."""

VECTOR = 8
"""Float16 numbers that the kernels load at once."""

FUSED_NORM = "layer_norm_residual_store_pre_ln_res"


def why_not_injectable(unet: Any) -> str | None:
    """What about a `UNet2DConditionModel` DeepSpeed's kernels would compute wrongly; None when nothing."""
    if unet.dtype != torch.float16:
        return f"its weights are {unet.dtype}, and the kernels compute in float16".replace("torch.", "")
    for module in unet.modules():
        if not isinstance(module, BasicTransformerBlock):
            continue
        for attention in (module.attn1, module.attn2):
            head, hidden = attention.to_q.out_features // attention.heads, attention.to_q.in_features
            if attention.to_q.bias is not None:
                return "its attentions' queries have a bias"
            if attention.to_q.out_features != hidden:
                return f"an attention is {attention.to_q.out_features} wide inside and {hidden} outside"
            if head % VECTOR:
                return f"heads of {head} channels, no multiple of {VECTOR}"
        if not isinstance(module.ff.net[0], GEGLU):
            return f"a feed-forward part of type {type(module.ff.net[0]).__name__}"
    return None


def inject(unet: Any) -> int:
    """Replace every transformer block of a `UNet2DConditionModel` in float16, and say how many.

    Raises:
        UnusableEngineError: DeepSpeed cannot be imported, has no such operation, or replaced nothing.
    """
    device = unet.device
    with _quiet():
        try:
            importlib.import_module("diffusers.models.autoencoders.autoencoder_kl")  # looked up there, not imported
            from deepspeed.module_inject.replace_module import generic_injection
        except Exception as error:  # an import can fail in any way on a machine without CUDA
            raise UnusableEngineError(f"DeepSpeed cannot be imported: {type(error).__name__}: {error}") from error
        text_encoder = SimpleNamespace(text_model=SimpleNamespace(), device=device, dtype=unet.dtype, config=None)
        generic_injection(SimpleNamespace(text_encoder=text_encoder, unet=unet), dtype=torch.float16, enable_cuda_graph=False)
    blocks, attentions = injected_blocks(unet), injected_attentions(unet)
    if not blocks or len(attentions) != 2 * len(blocks):
        raise UnusableEngineError(f"DeepSpeed replaced {len(blocks)} transformer blocks and {len(attentions)} attentions")
    unet.to(device)  # generic_injection leaves the new blocks' biases in the host's memory
    for attention in attentions:
        attention.config.layer_id = NEVER_ALLOCATES
        attention.triton_flash_attn_kernel = GuardedFlash(attention.triton_flash_attn_kernel)
        attention.pad_transform_func = SplitHeads()
    for block in blocks:
        _use_fused_norm(block)
        _split_projections(block.attn_2)
    return len(blocks)


def injected_blocks(unet: Any) -> list[Any]:
    from deepspeed.ops.transformer.inference.diffusers_transformer_block import DeepSpeedDiffusersTransformerBlock

    return [module for module in unet.modules() if isinstance(module, DeepSpeedDiffusersTransformerBlock)]


def injected_attentions(unet: Any) -> list[Any]:
    from deepspeed.ops.transformer.inference.diffusers_attention import DeepSpeedDiffusersAttention

    return [module for module in unet.modules() if isinstance(module, DeepSpeedDiffusersAttention)]


class GuardedFlash(nn.Module):
    """The Triton kernel for whole blocks of tokens; torch's attention otherwise, where the kernel would leave the tensors."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, block_128: bool) -> Any:
        if query.shape[2] % FLASH_BLOCK:
            return scaled_dot_product_attention(query, key, value, scale=scale)
        return self.kernel(query, key, value, scale, block_128)


class SplitHeads(nn.Module):
    """B × tokens × channels to B × heads × tokens × head, in the place of an operation that loses the last odd token."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, _: bool) -> list[torch.Tensor]:
        return [tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (query, key, value)]


def _use_fused_norm(block: Any) -> None:
    """Its binding, since 2024, calls torch in float32 where the compiled kernel is."""
    if (fused := getattr(block.layer_norm.inference_module, FUSED_NORM, None)) is None:
        raise UnusableEngineError(f"DeepSpeed's extension has no {FUSED_NORM}; it was built from another release")
    setattr(block.layer_norm, FUSED_NORM, fused)


def _split_projections(cross: Any) -> None:
    """Where text and image happen to be equally wide, a cross-attention was taken for a self-attention: its three matrices
    are in one tensor, and the tensors that it uses were never filled.
    """
    if cross.attn_qkvw is not None:
        parts = cross.attn_qkvw.data.chunk(3, dim=-1)
        cross.attn_qw.data, cross.attn_kw.data, cross.attn_vw.data = (part.contiguous() for part in parts)
        cross.attn_qkvw = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints and logs to stdout, which is for our results, and uses what diffusers means to remove."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield

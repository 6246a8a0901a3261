"""torch equivalents of the operations that DeepSpeed's Stable Diffusion kernels call, for machines without a GPU.

They take and give what the CUDA and Triton code takes and gives, its faults included, as far as they are known from its source
(csrc/transformer/inference of DeepSpeed 0.19.8): results lie in one workspace of the process, which keeps what it held;
`pad_transform` leaves out the last token of an odd number; the flash kernel works on whole blocks. What would write outside
its memory on a GPU raises here. So what a test sees go wrong without a precaution would go wrong there.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional


class OutsideMemoryError(Exception):
    """A CUDA kernel would have written where nothing is allocated for it."""


class Operations:
    """Stands for the extension `transformer_inference`; counts its calls."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.workspace: torch.Tensor | None = None
        self.most_used = 0
        self.free_bytes = 8 << 30

    def allocate_workspace_fp16(
        self,
        hidden_size: int,
        num_heads: int,
        prompt_length: int,
        num_rows: int,
        num_layers: int,
        num_ranks: int,
        has_external_cache: bool,
        rank: int,
        max_tokens: int,
        min_tokens: int,
    ) -> None:
        """`InferenceContext::GenWorkSpace`."""
        self.calls["allocate_workspace"] += 1
        head = hidden_size // num_heads
        head = head if head > 128 else 32 if head <= 32 else 64 if head <= 64 else 128
        activations = 10 * num_heads * head * num_rows
        scores = num_rows * num_heads // num_ranks * max_tokens
        cache = 0 if has_external_cache else num_layers * num_rows * num_heads * head // num_ranks * 2
        tokens = min(max_tokens, (self.free_bytes - scores - (500 << 20)) // 2 // (activations + scores + cache))
        if tokens < min_tokens:
            raise RuntimeError("Workspace can't be allocated, not enough memory")
        # What a fresh piece of device memory holds is anybody's guess.
        self.workspace = torch.full(((activations + scores + cache) * tokens,), torch.nan, dtype=torch.float16)

    allocate_workspace_fp32 = allocate_workspace_bf16 = allocate_workspace_fp16

    def release_workspace(self) -> None:
        self.calls["release_workspace"] += 1
        self.workspace = None

    def retake_workspace(self) -> None: ...

    def reset_cache(self) -> None: ...

    def softmax_context_fp16(self, *_: Any) -> None:
        raise AssertionError("no part of a Stable Diffusion UNet calls it")

    def linear_layer_fp16(
        self,
        tokens: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        has_bias: bool,
        is_for_flash: bool,
        num_heads: int,
        is_transposed: bool,
        rope_theta: float,
    ) -> torch.Tensor:
        """`ds_linear_layer`: product in the workspace; for the flash kernel sorted by head and padded, behind it."""
        self.calls["linear_layer"] += 1
        product = tokens @ (weight.t() if is_transposed else weight)
        if has_bias:
            product = product + bias
        placed = self._place(0, product)
        if not is_for_flash:
            return placed
        rows, count, hidden = tokens.shape
        head = hidden // num_heads
        sorted_ = product.view(rows, count, 3, num_heads, head).permute(2, 0, 3, 1, 4)
        if (head % 32 != 0 and head < 64) or head % 64 != 0:
            padded = 32 if head < 32 else 64 if head < 64 else 128
            sorted_ = functional.pad(sorted_, (0, padded - head))
            self._place(product.numel(), sorted_)
            return self._place(product.numel() + sorted_.numel(), sorted_)
        return self._place(product.numel(), sorted_)

    def pad_transform_fp16(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_heads: int, is_for_flash: bool
    ) -> list[torch.Tensor]:
        """`launch_pad_add_transform_0213`: blocks of two tokens, half as many as there are tokens, rounded down."""
        self.calls["pad_transform"] += 1
        made, start = [], 0
        for tensor in (query, key, value):
            sorted_ = tensor.unflatten(-1, (num_heads, -1)).transpose(1, 2)
            place = self._room(start, sorted_.numel()).view(sorted_.shape)
            written = sorted_.shape[2] // 2 * 2
            place[:, :, :written] = sorted_[:, :, :written]
            made.append(place)
            start += sorted_.numel()
        return made

    def layer_norm(self, tokens: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, epsilon: float) -> torch.Tensor:
        self.calls["layer_norm"] += 1
        _takes_memory_as_it_lies(tokens)
        return _norm(tokens.float(), gamma, beta, epsilon)

    layer_norm_fp16 = layer_norm_fp32 = layer_norm

    def layer_norm_residual_store_pre_ln_res(
        self,
        tokens: torch.Tensor,
        bias: torch.Tensor,
        residual: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor,
        epsilon: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls["fused_layer_norm"] += 1
        _takes_memory_as_it_lies(tokens, residual)
        summed = tokens.float() + bias.float() + residual.float()
        return _norm(summed, gamma, beta, epsilon), summed.to(tokens.dtype)

    def gated_activation(self, tokens: torch.Tensor, bias: torch.Tensor, kind: int) -> torch.Tensor:
        self.calls["gated_activation"] += 1
        _takes_memory_as_it_lies(tokens)
        value, gate = (tokens.float() + bias.float()).chunk(2, dim=-1)
        return (value * functional.gelu(gate)).to(tokens.dtype)

    def _room(self, start: int, count: int) -> torch.Tensor:
        if self.workspace is None or start + count > self.workspace.numel():
            raise OutsideMemoryError(f"{start + count} elements of workspace, there are {self.workspace}")
        self.most_used = max(self.most_used, start + count)
        return self.workspace[start : start + count]

    def _place(self, start: int, made: torch.Tensor) -> torch.Tensor:
        place = self._room(start, made.numel()).view(made.shape)
        return place.copy_(made)


class SpatialOperations:
    """Stands for the extension `spatial_inference`."""

    def __init__(self, calls: Counter[str]) -> None:
        self._calls = calls

    def nhwc_bias_add_add(self, tokens: torch.Tensor, bias: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        self._calls["bias_add_add"] += 1
        _takes_memory_as_it_lies(tokens, other)
        return (tokens.float() + bias.float() + other.float()).to(tokens.dtype)


def flash_kernel(calls: Counter[str]) -> type[torch.nn.Module]:
    """Stands for `triton_flash_attn`: every block is whole, wherever the tensors end."""

    class FlashKernel(torch.nn.Module):
        def forward(
            self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, block_128: bool = True
        ) -> torch.Tensor:
            calls["flash"] += 1
            if query.shape[2] % (128 if block_128 else 64):
                raise OutsideMemoryError(f"{query.shape[2]} tokens are not a whole number of blocks")
            head = query.shape[-1]
            assert head >= 16 and head & (head - 1) == 0, "Triton's blocks are powers of two"
            scores = (query.float() @ key.float().transpose(-1, -2) * scale).softmax(-1)
            return (scores @ value.float()).to(query.dtype)

    return FlashKernel


@contextlib.contextmanager
def torch_operations() -> Iterator[Operations]:
    """Let DeepSpeed find these instead of its compiled extensions."""
    from deepspeed.ops.transformer.inference import bias_add, diffusers_attention
    from deepspeed.ops.transformer.inference.op_binding.base import BaseOp

    operations = Operations()
    before = BaseOp.inference_module, bias_add.spatial_cuda_module, diffusers_attention.triton_flash_attn
    BaseOp.inference_module = operations
    bias_add.spatial_cuda_module = SpatialOperations(operations.calls)
    diffusers_attention.triton_flash_attn = flash_kernel(operations.calls)
    try:
        yield operations
    finally:
        BaseOp.inference_module, bias_add.spatial_cuda_module, diffusers_attention.triton_flash_attn = before


def _norm(tokens: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, epsilon: float) -> torch.Tensor:
    normed = functional.layer_norm(tokens, gamma.shape, gamma.float(), beta.float(), epsilon)
    return normed.to(gamma.dtype)


def _takes_memory_as_it_lies(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        assert tensor.is_contiguous(), f"a kernel would read {tuple(tensor.shape)} by strides it does not have"

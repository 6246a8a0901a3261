"""DeepSpeed's compiled operations for a trace: the kernels each launches and their bytes, as its source has them.

They cannot run on fake tensors, so here they make tensors of the right shapes and report to the trace what
`csrc/transformer/inference` of DeepSpeed 0.19.8 launches: `linear_layer` a cuBLAS product, with a bias a kernel of its own, and
for the flash kernel one that pads the heads and one that sorts by head; each norm, each GEGLU and the last sum one kernel; the
flash kernel one kernel on heads padded to a power of two, whose padding it multiplies, too. What DeepSpeed's Python code does
around them is not modelled but run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from cuda_trace import Trace

from mii_serve.engine.kernels.deepspeed.injection import FUSED_NORM


class Operations:
    """Stands for the extension `transformer_inference`."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        setattr(self, FUSED_NORM, self._add_norm)

    def linear_layer_fp16(
        self, tokens: Any, weight: Any, bias: Any, has_bias: bool, is_for_flash: bool, num_heads: int, *_: Any
    ) -> torch.Tensor:
        rows, count, depth = tokens.shape
        product = tokens.new_empty(rows, count, weight.shape[1])
        flops = 2 * rows * count * depth * weight.shape[1]
        self._trace.launch("deepspeed: linear_layer", [tokens, weight, product], flops=flops)
        if has_bias:
            self._trace.launch("deepspeed: linear_layer, bias", [product, product])
        if not is_for_flash:
            return product
        head = depth // num_heads
        if head % 64:
            made = tokens.new_empty(3, rows, num_heads, count, 32 if head < 32 else 64 if head < 64 else 128)
            self._trace.launch("deepspeed: pads heads", [product, made])
            self._trace.launch("deepspeed: sorts by head", [made, made])
            return made
        made = tokens.new_empty(3, rows, num_heads, count, head)
        self._trace.launch("deepspeed: sorts by head", [product, made])
        return made

    def layer_norm(self, tokens: Any, gamma: Any, beta: Any, epsilon: float) -> torch.Tensor:
        made = torch.empty_like(tokens)
        self._trace.launch("deepspeed: layer_norm", [tokens, made])
        return made

    def gated_activation(self, tokens: Any, bias: Any, kind: int) -> torch.Tensor:
        made = tokens.new_empty(*tokens.shape[:-1], tokens.shape[-1] // 2)
        self._trace.launch("deepspeed: gated_activation", [tokens, made])
        return made

    def nhwc_bias_add_add(self, tokens: Any, bias: Any, other: Any) -> torch.Tensor:
        made = torch.empty_like(tokens)
        self._trace.launch("deepspeed: adds bias and residual", [tokens, other, made])
        return made

    def _add_norm(
        self, tokens: Any, bias: Any, residual: Any, gamma: Any, beta: Any, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, summed = torch.empty_like(tokens), torch.empty_like(tokens)
        self._trace.launch("deepspeed: layer_norm of a sum", [tokens, residual, normed, summed])
        return normed, summed

    layer_norm_fp16 = layer_norm_fp32 = layer_norm

    def _not_called(self, *_: Any) -> None:
        raise AssertionError("no part of a turn calls it")

    allocate_workspace_fp16 = allocate_workspace_fp32 = allocate_workspace_bf16 = _not_called
    softmax_context_fp16 = pad_transform_fp16 = retake_workspace = reset_cache = _not_called

    def release_workspace(self) -> None:
        pass


def _flash_kernel(trace: Trace) -> type[torch.nn.Module]:
    class FlashKernel(torch.nn.Module):
        def forward(self, query: Any, key: Any, value: Any, scale: float, block_128: bool = True) -> torch.Tensor:
            made = torch.empty_like(query)
            rows, heads, count, head = query.shape
            flops = 4 * rows * heads * count * count * head
            trace.launch("deepspeed: flash attention", [query, key, value, made], flops=flops)
            return made

    return FlashKernel


@contextlib.contextmanager
def modelled_operations(trace: Trace) -> Iterator[None]:
    """Let DeepSpeed find these in the place of its extensions and of its Triton kernel."""
    from deepspeed.ops.transformer.inference import bias_add, diffusers_attention
    from deepspeed.ops.transformer.inference.op_binding.base import BaseOp

    operations = Operations(trace)
    before = BaseOp.inference_module, bias_add.spatial_cuda_module, diffusers_attention.triton_flash_attn
    BaseOp.inference_module = bias_add.spatial_cuda_module = operations
    diffusers_attention.triton_flash_attn = _flash_kernel(trace)
    try:
        yield
    finally:
        BaseOp.inference_module, bias_add.spatial_cuda_module, diffusers_attention.triton_flash_attn = before

"""Cases for the Triton kernels, at real channel counts and few pixels, with their own tiles; run in the interpreter on a CPU.

A script, because the interpreter is chosen by `TRITON_INTERPRET=1` before Triton is imported. It writes a JSON object: for each
case how far the kernel is from float32 or float64, and how far its twin in torch is, as root mean square over the right
answer's own; and the most that the kernel may be.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch.nn import functional

from mii_serve.engine.kernels.fused.operations import Operations, TorchOperations, Upsampling
from mii_serve.engine.kernels.fused.sampler import FusedSampler
from mii_serve.engine.kernels.fused.triton_operations import TritonBeforeConvolution, TritonOperations
from mii_serve.engine.kernels.sampler import TorchSampler

Case = Callable[[Operations], tuple[torch.Tensor, torch.Tensor]]
"""From the operations to what they make and what is right."""

MAX_ERROR = 4e-4
"""Of a kernel. Rounding to float16 alone is 2e-4; attention rounds its weights, too."""
MAX_UPSAMPLE_ERROR = 6e-4
"""A transposed convolution's weights are sums, rounded to float16 once more."""

GENERATOR = torch.Generator().manual_seed(0)


def half(*size: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
    made = (torch.randn(size, generator=GENERATOR, device="cpu") * scale + mean).half()
    return made.to(torch.get_default_device())


def image(channels: int, height: int, width: int, rows: int = 1, mean: float = 0.0) -> torch.Tensor:
    return half(rows, channels, height, width, mean=mean).contiguous(memory_format=torch.channels_last)


def norm(channels: int) -> SimpleNamespace:
    return SimpleNamespace(weight=half(channels), bias=half(channels), eps=1e-5, num_groups=32)


def group_norm(
    first: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    other: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    has_after: bool = False,
    is_silu: bool = True,
) -> Case:
    width = first.shape[1] + (0 if other is None else other.shape[1])
    about, after = norm(width), half(width).float() if has_after else None
    true_total = first.double()
    if bias is not None:
        true_total = true_total + bias[..., None, None]
    if residual is not None:
        true_total = true_total + residual
    if other is not None:
        true_total = torch.cat((true_total, other.double()), dim=1)
    true = functional.group_norm(true_total, 32, about.weight.double(), about.bias.double(), about.eps)
    true = functional.silu(true) if is_silu else true
    if after is not None:
        true_total = true_total + after[:, None, None]

    def make(operations: Operations) -> tuple[torch.Tensor, torch.Tensor]:
        normed, total = operations.group_norm(
            first, about, is_silu=is_silu, bias=bias, residual=residual, other=other, after=after, keeps_total=True
        )
        assert total is not None and total.is_contiguous(memory_format=torch.channels_last)
        assert normed.is_contiguous(memory_format=torch.channels_last)
        return torch.cat((normed, total / true_total.std())), torch.cat((true, true_total / true_total.std()))

    return make


def alone(first: torch.Tensor, bias: torch.Tensor | None = None) -> Case:
    """As after a first convolution: the sum is not kept."""
    about = norm(first.shape[1])
    summed = first.double() if bias is None else first.double() + bias[..., None, None]
    true = functional.silu(functional.group_norm(summed, 32, about.weight.double(), about.bias.double(), about.eps))

    def make(operations: Operations) -> tuple[torch.Tensor, torch.Tensor]:
        normed, total = operations.group_norm(first, about, is_silu=True, bias=bias)
        assert total is None
        return normed, true

    return make


def upsample(first: torch.Tensor, residual: torch.Tensor | None = None, *, is_convolved_larger: bool = False) -> Case:
    bias = half(first.shape[1])
    summed = first.double() + bias[:, None, None] + (0 if residual is None else residual.double())
    weight = half(24, first.shape[1], 3, 3, scale=(9 * first.shape[1]) ** -0.5)
    larger = functional.interpolate(summed, scale_factor=2.0, mode="nearest")
    true = functional.conv2d(larger, weight.double(), padding=1)

    def make(operations: Operations) -> tuple[torch.Tensor, torch.Tensor]:
        if is_convolved_larger and isinstance(operations, TritonOperations):
            operations = TritonBeforeConvolution()
        return operations.upsample(first, Upsampling(weight), bias, residual), true

    return make


def layer_norm(width: int, num_tokens: int, *, has_bias: bool) -> Case:
    tokens, about, bias = half(num_tokens, width), norm(width), half(width).float() if has_bias else None
    summed = tokens.float() if bias is None else tokens.float() + bias
    true = functional.layer_norm(summed, (width,), about.weight.float(), about.bias.float(), about.eps)
    return lambda operations: (operations.layer_norm(tokens, about, bias), true)


def linear_geglu(depth: int, width: int, num_tokens: int) -> Case:
    tokens, weight, bias = half(num_tokens, depth), half(2 * width, depth, scale=depth**-0.5), half(2 * width)
    value, gate = functional.linear(tokens.float(), weight.float(), bias.float()).chunk(2, dim=-1)
    return lambda operations: (operations.linear_geglu(tokens, weight, bias), value * functional.gelu(gate))


def geglu(width: int, num_tokens: int) -> Case:
    hidden = half(num_tokens, 2 * width)
    value, gate = hidden.float().chunk(2, dim=-1)

    def make(operations: Operations) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(operations, TritonOperations):
            return operations.geglu(hidden), value * functional.gelu(gate)
        first, second = hidden.chunk(2, dim=-1)
        return first * functional.gelu(second), value * functional.gelu(gate)

    return make


def attention(head: int, num_queries: int, num_keys: int | None = None, heads: int = 2) -> Case:
    """Without a number of keys the three are one tensor, as one matrix product leaves them."""
    if num_keys is None:
        query, key, value = half(1, num_queries, 3, heads, head).unbind(2)
    else:
        query = half(1, num_queries, heads, head)
        key, value = half(1, num_keys, 4, heads, head).unbind(2)[1:3]
    true = functional.scaled_dot_product_attention(*(one.float().transpose(1, 2) for one in (query, key, value)))
    return lambda operations: (operations.attention(query, key, value), true.transpose(1, 2))


def cases() -> Iterator[tuple[str, Case]]:
    """Their tensors are on torch's default device."""
    summed = {"residual": image(1280, 8, 8), "other": image(640, 8, 8), "bias": half(1, 1280)}
    yield "group norm, whole, all that can be added", group_norm(image(1280, 8, 8), **summed, has_after=True)
    yield "group norm, whole, two rows, bias of a row, odd size", alone(image(320, 5, 7, rows=2), half(2, 320))
    yield "group norm, whole, far from zero", alone(image(320, 8, 8, mean=30.0))
    yield "group norm, whole, bias for all rows", group_norm(image(640, 4, 4, rows=2), bias=half(640))
    yield "group norm, in parts, bias of a row", alone(image(320, 33, 33), half(1, 320))
    summed = {"residual": image(1280, 16, 16), "other": image(1280, 16, 16), "bias": half(1280)}
    yield "group norm, in parts, all that can be added", group_norm(image(1280, 16, 16), **summed, has_after=True)
    yield "group norm, in parts, far from zero", alone(image(128, 65, 66, mean=30.0))
    yield "upsample with a residual", upsample(image(320, 5, 7, rows=2), image(320, 5, 7, rows=2))
    yield "upsample", upsample(image(128, 8, 8))
    yield "upsample and then convolve", upsample(image(320, 5, 7, rows=2), image(320, 5, 7, rows=2), is_convolved_larger=True)
    for width, num_tokens in ((320, 9), (640, 6), (1280, 5)):
        yield f"layer norm, {width}", layer_norm(width, num_tokens, has_bias=True)
    yield "layer norm without a bias", layer_norm(320, 8, has_bias=False)
    yield "linear layer and GEGLU", linear_geglu(320, 1280, 130)
    yield "GEGLU", geglu(1280, 5)
    for head, num_queries, num_keys in (
        *((40, 130, None), (40, 70, 77), (80, 128, None), (80, 64, 77)),
        *((160, 256, None), (160, 64, None), (160, 65, 77)),
    ):
        yield f"attention, head {head}, {num_keys or num_queries} keys", attention(head, num_queries, num_keys)


def sampler(size: tuple[int, int, int], rescale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel makes, and what torch does: inputs, predictions, and the states of samples in slots of their own."""
    num_samples, num_rows = 3, 5

    def full(*sizes: int) -> torch.Tensor:
        return half(*sizes).float()

    state, noise, matrices = full(6, 5, *size), full(num_samples, *size), full(num_samples, 5, 7)
    noise_pred = half(num_rows, *size).contiguous(memory_format=torch.channels_last)
    slots, uncond_row = torch.tensor([2, 0, 5]), torch.tensor([3, 4, 2])
    scales, rescales = torch.tensor([7.5, 3.0, 1.5]), torch.tensor([rescale, 0.0, rescale])
    made = []
    for way in (FusedSampler(), TorchSampler()):
        stepped = state.clone()
        model_input, latents = way.begin(stepped, slots, scales, torch.float16)
        assert latents.is_contiguous(memory_format=torch.channels_last)
        prediction = way.end(stepped, slots, noise_pred, uncond_row, scales, rescales, noise, matrices, is_guided=True)
        made.append(torch.cat([one.float().flatten() for one in (model_input, latents, prediction, stepped)]))
    return made[0], made[1]


def error(made: torch.Tensor, true: torch.Tensor) -> float:
    return float((made.double() - true).square().mean().sqrt() / true.square().mean().sqrt())


def max_error(name: str) -> float:
    """Of the case of this name."""
    return MAX_UPSAMPLE_ERROR if name.startswith("upsample") else MAX_ERROR


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for name, make in cases():
        found[name] = {
            "triton": error(*make(TritonOperations())),
            "torch": error(*make(TorchOperations())),
            "most": max_error(name),
        }
    for size, rescale in (((4, 9, 8), 0.0), ((4, 33, 17), 0.7)):
        found[f"sampler, rescaled by {rescale}"] = {"triton": error(*sampler(size, rescale)), "torch": 0.0, "most": MAX_ERROR}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

"""What the fused UNet and VAE ask for: their operations, and each of them in plain torch.

`Operations` is the contract, in which an image is N × C × H × W in channels last and tokens are a matrix, tokens × channels.
`TorchOperations` is the twin of the Triton kernels: it stands in for each that a device cannot run, and it says what they
compute.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn.functional import conv2d, gelu, interpolate, layer_norm, linear, scaled_dot_product_attention, silu


class Norm(Protocol):
    """What is used of `torch.nn.GroupNorm` and `torch.nn.LayerNorm`; a GroupNorm has `num_groups`."""

    weight: Any
    bias: Any
    eps: float


class Upsampling:
    """A 3 × 3 convolution of an image that was made twice as high and wide, each pixel four times.

    The two are one transposed convolution of the smaller image: a pixel of the result sees two of its pixels along each side,
    with one weight or the sum of two. It needs four ninths of the arithmetic, and nothing is written in between.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        """Output channels × input channels × 3 × 3, in channels last."""
        sums = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float32).to(weight.device)
        transposed = torch.einsum("ka,lb,oiab->iokl", sums, sums, weight.float()).to(weight.dtype)
        self.transposed = in_channels_last(transposed)
        """Input channels × output channels × 4 × 4, of a stride of 2 and a padding of 1."""

    def float(self) -> Upsampling:
        return Upsampling(self.weight.float())


class Operations(Protocol):
    def group_norm(
        self,
        image: torch.Tensor,
        norm: Any,
        *,
        is_silu: bool,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        other: torch.Tensor | None = None,
        after: torch.Tensor | None = None,
        keeps_total: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The GroupNorm of image + bias + residual, followed along the channels by `other`; then SiLU, where asked for.

        `bias` is C or N × C. With `keeps_total`, the second tensor is what was normalised plus `after`, one number for each
        channel; without, it is None.
        """
        ...

    def upsample(
        self,
        image: torch.Tensor,
        layer: Upsampling,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer's convolution, without its own bias, of image + bias + residual, twice as high and wide. `bias` is C."""
        ...

    def layer_norm(self, tokens: torch.Tensor, norm: Norm, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The LayerNorm of tokens + bias."""
        ...

    def linear_geglu(self, tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """The first half of a linear layer's outputs, times the GELU of the second."""
        ...

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of rows × tokens × heads × head tensors, each head's numbers side by side; the result is contiguous."""
        ...


class TorchOperations:
    """Implements `Operations` on any device and in any precision."""

    def group_norm(
        self,
        image: torch.Tensor,
        norm: Any,
        *,
        is_silu: bool,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        other: torch.Tensor | None = None,
        after: torch.Tensor | None = None,
        keeps_total: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        total = summed(image, bias, residual)
        if other is not None:
            total = torch.cat((total, other), dim=1)
        normed = torch.nn.functional.group_norm(total, norm.num_groups, norm.weight, norm.bias, norm.eps)
        if is_silu:
            normed = silu(normed)
        if not keeps_total:
            return in_channels_last(normed), None
        if after is not None:
            total = total + after.to(total.dtype)[:, None, None]
        return in_channels_last(normed), in_channels_last(total)

    def upsample(
        self,
        image: torch.Tensor,
        layer: Upsampling,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        larger = in_channels_last(interpolate(summed(image, bias, residual), scale_factor=2.0, mode="nearest"))
        return in_channels_last(conv2d(larger, layer.weight, padding=1))

    def layer_norm(self, tokens: torch.Tensor, norm: Norm, bias: torch.Tensor | None = None) -> torch.Tensor:
        if bias is not None:
            tokens = tokens + bias.to(tokens.dtype)
        return layer_norm(tokens, tokens.shape[-1:], norm.weight, norm.bias, norm.eps)

    def linear_geglu(self, tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        value, gate = linear(tokens, weight, bias).chunk(2, dim=-1)
        return value * gelu(gate)

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (one.transpose(1, 2) for one in (query, key, value))
        return scaled_dot_product_attention(query, key, value).transpose(1, 2).contiguous()


def summed(image: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
    """The image itself, where there is nothing to add. `bias` is C or N × C."""
    if bias is not None:
        image = image + bias.to(image.dtype)[..., None, None]
    return image if residual is None else image + residual


def in_channels_last(image: torch.Tensor) -> torch.Tensor:
    """The image itself, where it is so already."""
    return image.contiguous(memory_format=torch.channels_last)


def tokens_of(image: torch.Tensor) -> torch.Tensor:
    """The pixels of an image in channels last as tokens, N·H·W × C, in the same memory."""
    return image.permute(0, 2, 3, 1).view(-1, image.shape[1])


def image_of(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Tokens as an image of the height and width of another, in the same memory."""
    return tokens.view(-1, *like.shape[2:], tokens.shape[1]).permute(0, 3, 1, 2)

"""`Operations` by the Triton kernels: which kernels, on which grids, with which tiles.

Importing this module needs Triton. A kernel is compiled in its first call for a shape, and not again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.nn.functional import conv2d, conv_transpose2d, linear

from mii_serve.engine.kernels.fused import kernels, matmul_kernels, tiles
from mii_serve.engine.kernels.fused.operations import Norm, TorchOperations, Upsampling, in_channels_last
from mii_serve.engine.kernels.fused.tiles import Tile

Grid = tuple[int, ...]


class Launch(Protocol):
    def __call__(
        self,
        kernel: Any,
        grid: Grid,
        tile: Tile,
        tensors: Sequence[torch.Tensor | None],
        numbers: Sequence[float],
        options: Mapping[str, bool | int],
        flops: int = 0,
    ) -> None:
        """Run a kernel whose arguments are the tensors, the numbers, and by name the tile's sizes and the options.

        `flops` is what the matrix products in it come to, for those who count.
        """
        ...


def run_on_device(
    kernel: Any,
    grid: Grid,
    tile: Tile,
    tensors: Sequence[torch.Tensor | None],
    numbers: Sequence[float],
    options: Mapping[str, bool | int],
    flops: int = 0,
) -> None:
    """Implements `Launch`. A tensor that is missing is one that the kernel does not read."""
    there = next(tensor for tensor in tensors if tensor is not None)
    given = [there if tensor is None else tensor for tensor in tensors]
    kernel[grid](
        *given, *numbers, **dict(tile.sizes), **options, num_warps=tile.num_warps, num_stages=tile.num_stages
    )  # fmt: skip


class TritonOperations(TorchOperations):
    """Implements `Operations` for images in channels last and contiguous tokens, in float16 or bfloat16.

    Heads that no tile is for are left to torch.
    """

    def __init__(self, launch: Launch = run_on_device) -> None:
        self._launch = launch

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
        """One kernel where a group fits into one program's registers, three elsewhere."""
        num_rows, width, height, image_width = image.shape
        other_width = 0 if other is None else other.shape[1]
        size = num_rows, width + other_width, height, image_width
        normed = torch.empty(size, dtype=image.dtype, device=image.device, memory_format=torch.channels_last)
        total = image
        is_joined = residual is not None or other is not None
        if is_new := is_joined or (keeps_total and (bias is not None or after is not None)):
            total = torch.empty_like(normed)
        per_group = size[1] // norm.num_groups
        summed = [image, bias, residual, other]
        parts = {
            "HAS_BIAS": bias is not None,
            "HAS_RESIDUAL": residual is not None,
            "HAS_OTHER": other is not None,
            "KEEPS_TOTAL": is_new,
            "HAS_AFTER": after is not None,
        }
        num_pixels, bias_stride = height * image_width, 0 if bias is None or bias.dim() == 1 else bias.stride(0)
        if (tile := tiles.group_norm_whole(num_pixels, per_group)) is not None:
            self._launch(
                kernels.group_norm_whole,
                (num_rows, norm.num_groups),
                tile,
                [*summed, norm.weight, norm.bias, after, normed, total if is_new else None],
                [num_pixels, width, other_width, bias_stride, norm.eps],
                {**parts, "GROUP": per_group, "IS_SILU": is_silu},
            )
            return normed, total if keeps_total else None
        tile = tiles.group_sums(num_pixels)
        chunk_pixels = tile["PIXELS"] * tile["BLOCKS"]
        num_chunks = _blocks(num_pixels, chunk_pixels)
        sums = torch.empty(num_rows, num_chunks, 2, size[1], device=image.device)
        self._launch(
            kernels.group_sums,
            (num_rows, num_chunks, _blocks(size[1], tile["CHANNELS"])),
            tile,
            [*summed, after, total if is_new else None, sums],
            [num_pixels, width, other_width, bias_stride, num_chunks],
            parts,
        )
        scales = torch.empty(num_rows, 2, size[1], device=image.device)
        missing = None if is_new else bias
        self._launch(
            kernels.group_scales,
            (num_rows, norm.num_groups),
            tiles.group_scales(num_chunks, per_group),
            [sums, norm.weight, norm.bias, missing, after if is_new else None, scales],
            [num_pixels, size[1], bias_stride, num_chunks, norm.eps],
            {
                "GROUP": per_group,
                "CHUNK_PIXELS": chunk_pixels,
                "HAS_BIAS": missing is not None,
                "HAS_AFTER": is_new and after is not None,
            },
        )
        tile = tiles.GROUP_APPLY
        self._launch(
            kernels.group_apply,
            (num_rows, _blocks(num_pixels, tile["PIXELS"]), _blocks(size[1], tile["CHANNELS"])),
            tile,
            [total, scales, normed],
            [num_pixels, size[1]],
            {"IS_SILU": is_silu},
        )
        return normed, total if keeps_total else None

    def upsample(
        self,
        image: torch.Tensor,
        layer: Upsampling,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One transposed convolution."""
        if bias is not None or residual is not None:
            image = self.added(image, bias, residual)
        return in_channels_last(conv_transpose2d(image, layer.transposed, stride=2, padding=1))

    def added(
        self, image: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, *, is_larger: bool = False
    ) -> torch.Tensor:
        """image + bias + residual; larger, each pixel is there four times."""
        num_rows, width, height, image_width = image.shape
        size = num_rows, width, height * (1 + is_larger), image_width * (1 + is_larger)
        made = torch.empty(size, dtype=image.dtype, device=image.device, memory_format=torch.channels_last)
        tile, num_pixels = tiles.UPSAMPLE, height * image_width
        self._launch(
            kernels.upsample,
            (num_rows, _blocks(num_pixels, tile["PIXELS"]), _blocks(width, tile["CHANNELS"])),
            tile,
            [image, bias, residual, made],
            [num_pixels, width, image_width],
            {"HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None, "IS_LARGER": is_larger},
        )
        return made

    def layer_norm(self, tokens: torch.Tensor, norm: Norm, bias: torch.Tensor | None = None) -> torch.Tensor:
        num_tokens, width = tokens.shape
        normed, tile = torch.empty_like(tokens), tiles.layer_norm(width)
        self._launch(
            kernels.layer_norm,
            (_blocks(num_tokens, tile["TOKENS"]),),
            tile,
            [tokens, bias, norm.weight, norm.bias, normed],
            [num_tokens, width, norm.eps],
            {"HAS_BIAS": bias is not None},
        )
        return normed

    def linear_geglu(self, tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        num_tokens, depth = tokens.shape
        width, tile = len(weight) // 2, tiles.linear_geglu()
        made = tokens.new_empty(num_tokens, width)
        self._launch(
            matmul_kernels.linear_geglu,
            (_blocks(num_tokens, tile["TOKENS"]) * (width // tile["CHANNELS"]),),
            tile,
            [tokens, weight, bias, made],
            [num_tokens, width],
            {"DEPTH": depth},
            flops=4 * num_tokens * width * depth,
        )
        return made

    def geglu(self, hidden: torch.Tensor) -> torch.Tensor:
        """The first half of the channels, times the GELU of the second: what follows a linear layer of cuBLAS."""
        num_tokens, width = hidden.shape[0], hidden.shape[1] // 2
        made, tile = hidden.new_empty(num_tokens, width), tiles.GEGLU
        grid = _blocks(num_tokens, tile["TOKENS"]), _blocks(width, tile["CHANNELS"])
        self._launch(kernels.geglu, grid, tile, [hidden, made], [num_tokens, width], {})
        return made

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        num_rows, num_queries, num_heads, head = query.shape
        num_keys = key.shape[1]
        if (tile := tiles.attention(head, num_keys)) is None:
            return super().attention(query, key, value)
        assert key.stride() == value.stride()
        made = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        assert all(one.stride()[2:] == (head, 1) for one in (query, key, value)), "heads lie side by side"
        strides = [*query.stride()[:2], *key.stride()[:2], *made.stride()[:2]]
        self._launch(
            matmul_kernels.attention,
            (_blocks(num_queries, tile["QUERIES"]), num_rows * num_heads),
            tile,
            [query, key, value, made],
            [head**-0.5, num_queries, num_heads, *strides],
            {"IS_WHOLE": num_keys % tile["KEYS"] == 0, "STAGES": tile.num_stages},
            flops=4 * num_rows * num_heads * num_queries * num_keys * head,
        )
        return made


class TritonBeforeConvolution(TritonOperations):
    """The same but for `upsample`: a kernel makes the image larger, and cuDNN convolves it."""

    def upsample(
        self,
        image: torch.Tensor,
        layer: Upsampling,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return in_channels_last(conv2d(self.added(image, bias, residual, is_larger=True), layer.weight, padding=1))


class TritonAfterLinear(TritonOperations):
    """The same but for `linear_geglu`: cuBLAS multiplies, and a kernel does the rest."""

    def linear_geglu(self, tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return self.geglu(linear(tokens, weight, bias))


def _blocks(number: int, size: int) -> int:
    return -(-number // size)

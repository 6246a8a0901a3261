"""`Operations` that run each shape in the fastest way that was found right for it on this device."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mii_serve.engine.kernel_choices import OPERATIONS, TORCH, Choice, Shape
from mii_serve.engine.kernels.fused.measuring import (
    attention_shape,
    group_norm_shape,
    layer_norm_shape,
    linear_geglu_shape,
    upsample_shape,
)
from mii_serve.engine.kernels.fused.operations import Norm, Operations, TorchOperations, Upsampling


class ChosenOperations:
    """Implements `Operations` by the fastest way for each shape; for one that was not measured, by that of the nearest size.

    Where no size of a shape was measured, most of the operation's other shapes decide.
    """

    def __init__(self, choice: Choice, ways: Mapping[str, Operations]) -> None:
        self._ways: Mapping[str, Operations] = {**ways, TORCH: TorchOperations()}
        self._sizes: dict[tuple[str, Shape], list[tuple[int, str]]] = {}
        for one in choice.measurements:
            self._sizes.setdefault((one.operation, one.shape), []).append((one.size, one.fastest))
        self._usual = {operation: choice.usual(operation) for operation in OPERATIONS}
        self._way = functools.cache(self._find)

    def _find(self, operation: str, shape: Shape, size: int) -> Operations:
        if sizes := self._sizes.get((operation, shape)):
            _, name = min(sizes, key=lambda one: abs(math.log(one[0] / size)))
            return self._ways[name]
        return self._ways[self._usual[operation]]

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
        way = self._way(*group_norm_shape(image, residual, other, keeps_total=keeps_total))
        return way.group_norm(
            image,
            norm,
            is_silu=is_silu,
            bias=bias,
            residual=residual,
            other=other,
            after=after,
            keeps_total=keeps_total,
        )

    def upsample(
        self,
        image: torch.Tensor,
        layer: Upsampling,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self._way(*upsample_shape(image, layer, residual)).upsample(image, layer, bias, residual)

    def layer_norm(self, tokens: torch.Tensor, norm: Norm, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._way(*layer_norm_shape(tokens)).layer_norm(tokens, norm, bias)

    def linear_geglu(self, tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return self._way(*linear_geglu_shape(tokens, weight)).linear_geglu(tokens, weight, bias)

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return self._way(*attention_shape(query, key)).attention(query, key, value)


def source_digest(folder: Path = Path(__file__).parent) -> str:
    """Of the kernels and what calls them."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]

"""Runs each fused operation in every way there is, on a model's own inputs: which ways are right, and how fast each is.

It is an implementation of `Operations` itself, so that one pass through the UNet and the decoder measures all their shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from mii_serve.engine.kernel_choices import TORCH, Measurement, Shape
from mii_serve.engine.kernels.fused.operations import Norm, Operations, TorchOperations, Upsampling

MAX_ERROR = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-4}
"""Root mean square of the difference from float32 over that of the right answer; rounding alone is a tenth of it."""

Cast = Callable[[Any], Any]


@dataclass(slots=True, eq=False)
class MeasuringOperations:
    """Implements `Operations`; what it returns is torch's.

    `ways` are those beside torch; `time_ms` runs a call often enough to time it. `before` is called with an operation and a way
    before they run for the first time: what they do to the device, the process may not survive. `after` is called with each
    measurement.
    """

    ways: Mapping[str, Operations]
    time_ms: Callable[[Callable[[], object]], float]
    before: Callable[[str], None] = lambda what: None
    after: Callable[[Measurement], object] = lambda measurement: None
    has_time: Callable[[], bool] = lambda: True
    num_left: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    _known: set[tuple[str, Shape, int]] = field(default_factory=set)
    _begun: set[str] = field(default_factory=set)

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
        made: tuple[torch.Tensor, torch.Tensor | None] = self._measured(
            *group_norm_shape(image, residual, other, keeps_total=keeps_total),
            lambda way, cast: way.group_norm(
                cast(image),
                cast(norm),
                is_silu=is_silu,
                bias=cast(bias),
                residual=cast(residual),
                other=cast(other),
                after=cast(after),
                keeps_total=keeps_total,
            ),
        )
        return made

    def upsample(
        self,
        image: torch.Tensor,
        layer: Upsampling,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        made: torch.Tensor = self._measured(
            *upsample_shape(image, layer, residual),
            lambda way, cast: way.upsample(cast(image), cast(layer), cast(bias), cast(residual)),
        )
        return made

    def layer_norm(self, tokens: torch.Tensor, norm: Norm, bias: torch.Tensor | None = None) -> torch.Tensor:
        made: torch.Tensor = self._measured(
            *layer_norm_shape(tokens), lambda way, cast: way.layer_norm(cast(tokens), cast(norm), cast(bias))
        )
        return made

    def linear_geglu(self, tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self._measured(
            *linear_geglu_shape(tokens, weight), lambda way, cast: way.linear_geglu(cast(tokens), cast(weight), cast(bias))
        )
        return made

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self._measured(
            *attention_shape(query, key), lambda way, cast: way.attention(cast(query), cast(key), cast(value))
        )
        return made

    def _measured(self, operation: str, shape: Shape, size: int, call: Callable[[Operations, Cast], Any]) -> Any:
        return self.measured(operation, shape, size, call, TorchOperations(), self._ways_of(operation))

    def measured(
        self,
        operation: str,
        shape: Shape,
        size: int,
        call: Callable[[Any, Cast], Any],
        own: Any,
        ways: Iterable[tuple[str, Any]],
    ) -> Any:
        """What `call` makes with `own`, torch's way; the first time for a shape, the other ways are compared and timed."""
        made = call(own, _as_it_is)
        if (operation, shape, size) in self._known:
            return made
        self._known.add((operation, shape, size))
        if not self.has_time():
            self.num_left += 1
            return made
        true, dtype = call(own, _in_float32), _tensors(made)[0].dtype
        ms = {TORCH: self.time_ms(lambda: call(own, _as_it_is))}
        for name, way in ways:
            what = f"{operation}: {name}"
            if what in self.refused:
                continue
            if what not in self._begun:
                self._begun.add(what)
                self.before(what)
            try:
                found = error(call(way, _as_it_is), true)
                if not found <= MAX_ERROR[dtype]:  # NaN included
                    self.refused[what] = f"{found:.2g} off for {_text(shape, size)}"
                    continue
                ms[name] = self.time_ms(lambda way=way: call(way, _as_it_is))  # type: ignore[misc]
            except Exception as failure:  # noqa: BLE001 - a compiler's or a device's
                self.refused[what] = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
        self.measurements.append(Measurement(operation=operation, shape=shape, size=size, ms=ms))
        self.after(self.measurements[-1])
        return made

    def take(self, measurements: Iterable[Measurement], refused: Mapping[str, str]) -> None:
        """What was measured before is not measured again."""
        self.measurements.extend(measurements)
        self.refused.update(refused)
        self._known.update((one.operation, one.shape, one.size) for one in self.measurements)

    def _ways_of(self, operation: str) -> Iterator[tuple[str, Operations]]:
        """Those that do it differently from torch and from each other."""
        own = getattr(TorchOperations, operation)
        seen = []
        for name, way in self.ways.items():
            done = getattr(type(way), operation), str(getattr(way, "__dict__", None))
            if done[0] is not own and done not in seen:
                seen.append(done)
                yield name, way


# ---- what a call is known by ---------------------------------------------------------------------------------------


def group_norm_shape(
    image: torch.Tensor, residual: torch.Tensor | None, other: torch.Tensor | None, *, keeps_total: bool
) -> tuple[str, Shape, int]:
    width = image.shape[1] + (0 if other is None else other.shape[1])
    parts = (residual is not None) + 2 * (other is not None) + 4 * keeps_total
    return "group_norm", (width, *image.shape[2:], parts), len(image)


def upsample_shape(image: torch.Tensor, layer: Upsampling, residual: torch.Tensor | None) -> tuple[str, Shape, int]:
    return "upsample", (*image.shape[1:], len(layer.weight), int(residual is not None)), len(image)


def layer_norm_shape(tokens: torch.Tensor) -> tuple[str, Shape, int]:
    return "layer_norm", (tokens.shape[1],), len(tokens)


def linear_geglu_shape(tokens: torch.Tensor, weight: torch.Tensor) -> tuple[str, Shape, int]:
    return "linear_geglu", (tokens.shape[1], len(weight) // 2), len(tokens)


def attention_shape(query: torch.Tensor, key: torch.Tensor) -> tuple[str, Shape, int]:
    _, num_queries, num_heads, head = query.shape
    return "attention", (num_heads, head, num_queries, key.shape[1]), len(query)


def error(made: Any, true: Any) -> float:
    """The largest over the tensors of a result."""
    worst = 0.0
    for one, other in zip(_tensors(made), _tensors(true), strict=True):
        scale = float(other.float().square().mean().sqrt())
        found = float((one.float() - other.float()).square().mean().sqrt()) / (scale or 1.0)
        worst = found if math.isnan(found) else max(worst, found)
    return worst


def _tensors(made: Any) -> list[torch.Tensor]:
    return [one for one in (made if isinstance(made, tuple) else (made,)) if one is not None]


def _as_it_is(argument: Any) -> Any:
    return argument


def _in_float32(argument: Any) -> Any:
    if argument is None or isinstance(argument, (torch.Tensor, Upsampling)):
        return None if argument is None else argument.float()
    about = {"weight": argument.weight.float(), "bias": argument.bias.float(), "eps": argument.eps}
    return SimpleNamespace(**about, num_groups=getattr(argument, "num_groups", None))


def _text(shape: Shape, size: int) -> str:
    return "×".join(map(str, (size, *shape)))

"""Decides which fused operation runs in which way on this device, from measurements that are kept on disk.

A way must be right before it is timed, and the fastest right one of each shape is used. What was measured once on a kind of
device, with these versions and these kernels, is not measured again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mii_serve.engine.kernels.fused.measuring import (
    TORCH,
    Measurement,
    Shape,
    attention_shape,
    group_norm_shape,
    layer_norm_shape,
    linear_geglu_shape,
    upsample_shape,
)
from mii_serve.engine.kernels.fused.operations import Norm, Operations, TorchOperations

logger = logging.getLogger(__name__)

OPERATIONS = ("group_norm", "upsample", "layer_norm", "linear_geglu", "attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was measured, and why what could not be used was refused."""

    device: str
    measurements: tuple[Measurement, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One line: how many shapes of each operation run in which way."""
        texts = []
        for operation in OPERATIONS:
            ways = Counter(one.fastest for one in self.measurements if one.operation == operation)
            if ways:
                texts.append(f"{operation} {', '.join(f'{way} {count}' for way, count in sorted(ways.items()))}")
        return "; ".join((*texts, *(f"not {what} ({why})" for what, why in self.refused.items())))


class ChosenOperations:
    """Implements `Operations` by the fastest way for each shape; for one that was not measured, by that of the nearest size.

    Where no size of a shape was measured, most of the operation's other shapes decide.
    """

    def __init__(self, choice: Choice, ways: Mapping[str, Operations]) -> None:
        self._ways: Mapping[str, Operations] = {**ways, TORCH: TorchOperations()}
        self._sizes: dict[tuple[str, Shape], list[tuple[int, str]]] = {}
        most: dict[str, Counter[str]] = {operation: Counter() for operation in OPERATIONS}
        for one in choice.measurements:
            self._sizes.setdefault((one.operation, one.shape), []).append((one.size, one.fastest))
            most[one.operation][one.fastest] += 1
        self._usual = {operation: ways.most_common(1)[0][0] if ways else TORCH for operation, ways in most.items()}
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
        self, image: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._way(*upsample_shape(image)).upsample(image, bias, residual)

    def layer_norm(self, tokens: torch.Tensor, norm: Norm, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._way(*layer_norm_shape(tokens)).layer_norm(tokens, norm, bias)

    def linear_geglu(self, tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return self._way(*linear_geglu_shape(tokens, weight)).linear_geglu(tokens, weight, bias)

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return self._way(*attention_shape(query, key)).attention(query, key, value)


# ---- on disk -------------------------------------------------------------------------------------------------------


def choices_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mii_serve" / "kernels"


class ChoiceFile:
    """The choice for one kind of device, model and set of versions.

    A folder that cannot be written costs the next start its time, and nothing else.
    """

    def __init__(self, about: Mapping[str, Any], folder: Path) -> None:
        self._about = dict(about)
        text = json.dumps(self._about, sort_keys=True)
        self._path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        self._trying = self._path.with_suffix(".trying")

    def read(self) -> Choice | None:
        try:
            found = json.loads(self._path.read_text())
            return choice_from(found) if found["about"] == self._about else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, choice: Choice) -> None:
        _write(self._path, json.dumps({"about": self._about, **asdict(choice)}, indent=1) + "\n")

    def ended_the_process(self) -> str | None:
        """What was being tried when a start before this one ended without a result."""
        try:
            return self._trying.read_text().strip() or None
        except OSError:
            return None

    def begin(self, what: str) -> None:
        _write(self._trying, what)

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._trying.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    """Whole or not at all: several ranks may write it at once."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text)
        part.replace(path)
    except OSError as error:
        logger.info("the choice of kernels is not kept: %s", error)


def choice_from(found: Mapping[str, Any]) -> Choice:
    """A choice as `ChoiceFile` wrote it.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    measurements = tuple(
        Measurement(
            operation=one["operation"],
            shape=tuple(map(int, one["shape"])),
            size=int(one["size"]),
            ms={str(way): float(ms) for way, ms in one["ms"].items()},
        )
        for one in found["measurements"]
    )
    if not all(TORCH in one.ms and one.operation in OPERATIONS for one in measurements):
        raise ValueError("a measurement without torch's")
    return Choice(device=str(found["device"]), measurements=measurements, refused=dict(found["refused"]))


def source_digest() -> str:
    """Of the kernels and what calls them."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]

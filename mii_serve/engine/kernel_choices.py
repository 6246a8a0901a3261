"""Which fused operation runs in which way on a kind of device: what was measured, and the files that keep it. No torch.

What was measured once on a kind of device, with the same versions and kernels, is not measured again; `mii_serve doctor` shows
it. The kernels, and what measures them, are in `kernels/fused`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

OPERATIONS = ("group_norm", "upsample", "layer_norm", "linear_geglu", "attention", "sampler")

TORCH = "torch"
"""The way that every operation has, and that is right by definition."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One shape of one operation. `size` counts rows or tokens, `shape` is the rest; `ms` holds the ways that are right."""

    operation: str
    shape: Shape
    size: int
    ms: Mapping[str, float]

    @property
    def fastest(self) -> str:
        return min(self.ms, key=lambda way: self.ms[way])


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was measured, and why what could not be used was refused. `num_left` shapes there was no time to measure."""

    device: str
    measurements: tuple[Measurement, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    num_left: int = 0

    def usual(self, operation: str) -> str:
        """The way that is the fastest for most of an operation's shapes."""
        ways = Counter(one.fastest for one in self.measurements if one.operation == operation)
        return ways.most_common(1)[0][0] if ways else TORCH

    def summary(self) -> str:
        """One line: how many shapes of each operation run in which way."""
        texts = []
        for operation in OPERATIONS:
            ways = Counter(one.fastest for one in self.measurements if one.operation == operation)
            if ways:
                texts.append(f"{operation} {', '.join(f'{way} {count}' for way, count in sorted(ways.items()))}")
        return "; ".join((*texts, *(f"not {what} ({why})" for what, why in self.refused.items())))


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
        write_whole(self._path, json.dumps({"about": self._about, **asdict(choice)}, indent=1) + "\n")

    def ended_the_process(self) -> str | None:
        """What was being tried when a start before this one ended without a result."""
        try:
            return self._trying.read_text().strip() or None
        except OSError:
            return None

    def begin(self, what: str) -> None:
        write_whole(self._trying, what)

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._trying.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
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
    num_left = int(found.get("num_left", 0))
    return Choice(device=str(found["device"]), measurements=measurements, refused=dict(found["refused"]), num_left=num_left)


def kept_choices(folder: Path | None = None) -> list[Choice]:
    """All that is on this machine's disk, the newest first."""
    found: list[tuple[float, Choice]] = []
    for path in (folder or choices_folder()).glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.append((path.stat().st_mtime, choice_from(json.loads(path.read_text()))))
    return [choice for _, choice in sorted(found, key=lambda one: -one[0])]

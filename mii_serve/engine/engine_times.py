"""Which of `native` and `deepspeed` is faster on a device: what a start has measured, and the file that keeps it. No torch.

Without a measurement it is `COMPUTED_TO_BE_FASTER`. What measures is `kernels/comparison.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mii_serve.engine.kernel_choices import choices_folder, write_whole
from mii_serve.types import EngineName

COMPUTED_TO_BE_FASTER: EngineName = "native"
"""By the bounds in benchmarks/results/roofline.json, for every number of samples on every device there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTimes:
    """Milliseconds of a UNet call of one guided sample and of as many as there are slots, with each engine's kernels."""

    device: str
    native_ms: tuple[float, ...]
    deepspeed_ms: tuple[float, ...]

    @property
    def faster(self) -> EngineName:
        """By the mean of the ratios; `native` where they are equal."""
        ratios = [ours / theirs for ours, theirs in zip(self.native_ms, self.deepspeed_ms, strict=True)]
        return "deepspeed" if math.prod(ratios) > 1 else "native"

    def summary(self) -> str:
        native, deepspeed = (", ".join(f"{one:.1f}" for one in ms) for ms in (self.native_ms, self.deepspeed_ms))
        return f"a UNet call takes {deepspeed} ms with deepspeed, {native} ms with native"


class EngineTimesFile:
    """The times for one kind of device, model and set of versions."""

    def __init__(self, about: Mapping[str, Any], folder: Path | None = None) -> None:
        self._about = dict(about)
        text = json.dumps(self._about, sort_keys=True)
        self._path = (folder or choices_folder()) / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.engines"

    def read(self) -> EngineTimes | None:
        try:
            found = json.loads(self._path.read_text())
            return times_from(found) if found["about"] == self._about else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, times: EngineTimes) -> None:
        write_whole(self._path, json.dumps({"about": self._about, **asdict(times)}, indent=1) + "\n")


def times_from(found: Mapping[str, Any]) -> EngineTimes:
    """
    Raises:
        KeyError, TypeError, ValueError: it is not what `EngineTimesFile` has written.
    """
    native_ms, deepspeed_ms = (tuple(map(float, found[name])) for name in ("native_ms", "deepspeed_ms"))
    if not native_ms or len(native_ms) != len(deepspeed_ms) or min(*native_ms, *deepspeed_ms) <= 0:
        raise ValueError("no times of both")
    return EngineTimes(device=str(found["device"]), native_ms=native_ms, deepspeed_ms=deepspeed_ms)


def newest_times(folder: Path | None = None) -> EngineTimes | None:
    """What was measured last on this machine."""
    found: list[tuple[float, EngineTimes]] = []
    for path in (folder or choices_folder()).glob("*.engines"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.append((path.stat().st_mtime, times_from(json.loads(path.read_text()))))
    return max(found, key=lambda one: one[0])[1] if found else None

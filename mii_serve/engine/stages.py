"""How long a turn's stages took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

STAGES = ("encode", "denoise", "decode", "safety")


class StageClock:
    """Adds up host time by stage until it is read.

    On a GPU the host runs ahead: a stage holds the work that was waited for in it. The last stage of a turn that looks at a
    result waits for all before it.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @staticmethod
    def settle() -> None:
        """Called at both ends of a stage. A benchmark waits for the device here: then every stage holds its own work."""

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        self.settle()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.settle()
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds by stage since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds

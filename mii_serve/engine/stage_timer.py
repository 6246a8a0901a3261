"""How long the stages of a turn took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

STAGES = ("encode", "denoise", "decode", "safety")
"""Text encoder, UNet with samplers, VAE, safety checker."""


class StageTimer:
    """Adds up host time in seconds by stage until it is read.

    On a GPU the host runs ahead of the device: a stage holds the time in which the host waited for the device. The first stage
    that reads a result waits for all work before it.
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

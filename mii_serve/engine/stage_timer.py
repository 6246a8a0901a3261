"""How long the stages of a turn took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

STAGES = ("encode", "denoise", "decode", "safety")
"""Text encoder, UNet with samplers, VAE, safety checker."""


class StageTimer:
    """Adds up seconds by stage until they are read: of the device where it is given, else of the host."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._has_events = device is not None and device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @staticmethod
    def settle() -> None:
        """Called at both ends of a stage. A benchmark waits for the device here: then every stage holds its own work."""

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        self.settle()
        start = self._mark()
        try:
            yield
        finally:
            self.settle()
            self._spans.append((stage, start, self._mark()))

    def take(self) -> dict[str, float]:
        """Seconds by stage since the last call. The device must be done with them."""
        spans, self._spans = self._spans, []
        seconds: dict[str, float] = {}
        for stage, start, end in spans:
            passed = start.elapsed_time(end) / 1e3 if self._has_events else end - start
            seconds[stage] = seconds.get(stage, 0.0) + passed
        return seconds

    def _mark(self) -> Any:
        if not self._has_events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

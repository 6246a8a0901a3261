"""A turn between its launch and its end."""

from __future__ import annotations

import time
from typing import Any

import torch

from mii_serve.engine.stage_timer import StageTimer
from mii_serve.engine.turns import TurnResult
from mii_serve.errors import EngineError
from mii_serve.types import SampleProgress


class LaunchedTurn:
    """Implements `mii_serve.engine.turns.Turn`. On CUDA its times are the device's, and it ends when the device is done.

    Built before anything of the turn is launched; `end` is called after everything is.
    """

    def __init__(self, device: torch.device) -> None:
        self.timer = StageTimer(device)
        self._is_cuda = device.type == "cuda"
        self._started_at = time.monotonic()
        self._start = self._mark()
        self._end: Any = None
        self._progress: tuple[SampleProgress, ...] = ()

    def end(self, progress: tuple[SampleProgress, ...]) -> None:
        self._progress = progress
        self._end = self._mark()

    def is_done(self) -> bool:
        return not self._is_cuda or bool(self._end.query())

    def wait(self) -> TurnResult:
        try:
            if self._is_cuda:
                self._end.synchronize()
                elapsed_s = self._start.elapsed_time(self._end) / 1e3
            else:
                elapsed_s = self._end - self._start
            return TurnResult(
                progress=self._progress, started_at=self._started_at, elapsed_s=elapsed_s, stages=self.timer.take()
            )
        except RuntimeError as error:
            raise EngineError(f"the device failed: {type(error).__name__}: {error}") from error

    def _mark(self) -> Any:
        """On CUDA an event that is waited for without keeping a core busy."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record()
        return event

"""An engine whose device is a queue with a clock of its own: launched turns wait in it until the test lets time pass."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from fake_engine import FakeEngine
from patience import PATIENCE_S

from mii_serve.engine.turns import TurnResult
from mii_serve.types import SampleProgress, StepPlan

TURN_S = 0.25
"""The device's seconds for a turn."""


class QueuedTurn:
    def __init__(self, engine: QueuedEngine, progress: tuple[SampleProgress, ...]) -> None:
        self._engine = engine
        self._progress = progress
        self.has_ended = threading.Event()

    def is_done(self) -> bool:
        return self.has_ended.is_set()

    def wait(self) -> TurnResult:
        self._engine.is_waited_for.set()
        assert self.has_ended.wait(PATIENCE_S)
        return TurnResult(progress=self._progress, started_at=0.0, elapsed_s=TURN_S, stages={})


class QueuedEngine(FakeEngine):
    """A turn ends when the test says so, whatever the host does meanwhile. Pictures come in the turn."""

    def __init__(self, *, max_slots: int) -> None:
        super().__init__(max_slots=max_slots)
        self.on_decoded: Callable[[], None] = lambda: None
        self.queue: deque[QueuedTurn] = deque()
        self.num_launched = self.most_in_queue = 0
        self.is_waited_for = threading.Event()

    def launch(self, plan: StepPlan) -> QueuedTurn:
        turn = QueuedTurn(self, self.run(plan))
        self.queue.append(turn)
        self.num_launched += 1
        self.most_in_queue = max(self.most_in_queue, len(self.queue))
        return turn

    def has_decoded(self) -> bool:
        return False

    def take_decoded(self) -> list[TurnResult]:
        return []

    def end_turn(self) -> None:
        """Once the host waits, the first turn in the queue ends."""
        assert self.is_waited_for.wait(PATIENCE_S)
        self.is_waited_for.clear()
        self.queue.popleft().has_ended.set()

"""Slots and the line before them: first come, first served, samples joining and leaving between steps.

Promises: every sample that was added is either over exactly once or leaves because its request was dropped;
never more than `max_slots` samples run; a dropped request's slots are free in the very next plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from mii_serve.errors import QueueFullError
from mii_serve.types import GenerationParams, Sample, SampleId, SampleProgress, StepPlan


class Scheduler:
    """Alternate `plan` and `advance`; call `add` and `drop` at any time in between."""

    def __init__(self, *, max_slots: int, max_waiting_samples: int) -> None:
        self._max_slots = max_slots
        self._max_waiting = max_waiting_samples
        self._waiting: deque[Sample] = deque()
        self._running: dict[SampleId, None] = {}
        self._leaving: list[SampleId] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, request_id: str, params: GenerationParams) -> int:
        """Queue every image of a request, or none; answer how many samples are before its first one.

        Raises:
            QueueFullError: the line has no room for all of them.
        """
        count = params.num_images_per_prompt
        if len(self._waiting) + count > self._max_waiting + max(0, self._max_slots - len(self._running)):
            raise QueueFullError(f"{len(self._waiting)} images are waiting already, at most {self._max_waiting} may")
        ahead = len(self._waiting) + len(self._running)
        self._waiting.extend(Sample(id=SampleId(request_id, i), params=params) for i in range(count))
        return ahead

    def drop(self, request_id: str) -> None:
        """Forget a request; its running samples leave in the next plan. Unknown ids are ignored."""
        self._waiting = deque(sample for sample in self._waiting if sample.id.request_id != request_id)
        for sample_id in [s for s in self._running if s.request_id == request_id]:
            del self._running[sample_id]
            self._leaving.append(sample_id)

    def plan(self) -> StepPlan | None:
        """The next turn, or None when there is nothing to do."""
        joins = []
        while self._waiting and len(self._running) < self._max_slots:
            sample = self._waiting.popleft()
            self._running[sample.id] = None
            joins.append(sample)
        leaves, self._leaving = tuple(self._leaving), []
        if not self._running and not leaves:
            return None
        return StepPlan(joins=tuple(joins), steps=tuple(self._running), leaves=leaves)

    def advance(self, progress: Iterable[SampleProgress]) -> None:
        """Take in what the turn achieved; finished samples give their slots back."""
        for sample in progress:
            if sample.is_over:
                self._running.pop(sample.id, None)

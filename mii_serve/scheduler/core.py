"""Which samples run next. Pure: no clock, no device; time is an argument and the answer is a value.

The rules:
  - A slot holds one sample from its first UNet call until its picture is given to the decoder. Never more than `max_slots` are
    held, and no more pictures than that are in the decoder.
  - A turn may be planned while the one before it runs: a plan goes by the calls that are planned, not by those that are made.
  - A turn is one UNet call for all running samples of one batch key; keys take turns, the longest unserved one first.
  - Free slots go to the front of the queue (`queue.py`) between any two turns.
  - Finished samples are decoded a few at a time, oldest first, so that a burst of endings does not hold up the others.
  - At most one preview a turn, so that a caller who wants many slows the others little.
  - A dropped request's slots are free in the very next plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from mii_serve.errors import DeadlineExceededError, EngineError, QueueFullError
from mii_serve.scheduler.queue import QueuedSample, SampleQueue
from mii_serve.scheduler.step_time import StepTimeEstimate
from mii_serve.types import BatchKey, EngineCapacity, LatentShape, Request, Sample, SampleId, SampleProgress, StepPlan

MIN_RETRY_S = 0.1
"""The shortest `retry_after_s` of a refusal, in seconds: of the order of a turn on a GPU, and at most ten retries a second."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a request is in the queue; `estimated_wait_s` is None before any turn was measured."""

    num_samples_ahead: int
    estimated_wait_s: float | None


@dataclass(slots=True, eq=False)
class RunningSample:
    """A sample that has started: `num_planned` of its UNet calls are planned, and `step` of them are known to be made.

    `preview_due_since` is the turn since which a preview of it is due.
    """

    sample: Sample
    request: Request
    num_planned: int = 0
    step: int = 0
    preview_due_since: int | None = None

    @property
    def work_left(self) -> int:
        return (self.request.num_calls - self.step) * self.request.params.work_per_call


class Scheduler:
    """Every `plan` has its `advance`, in the same order, and may come before the last one's. Call anything else at any time."""

    def __init__(self, capacity: EngineCapacity, *, max_waiting_samples: int, max_waiting_s: float) -> None:
        self._capacity = capacity
        self._max_waiting_samples, self._max_waiting_s = max_waiting_samples, max_waiting_s
        self._queue = SampleQueue()
        self._running: dict[SampleId, RunningSample] = {}
        self._groups: dict[BatchKey, dict[SampleId, RunningSample]] = {}  # the next one to have its turn comes first
        self._finished: dict[SampleId, RunningSample] = {}  # with a slot, and no call left to plan
        self._decoding: dict[SampleId, RunningSample] = {}  # without a slot
        self._leaving: list[SampleId] = []
        self._deadlines: dict[str, float] = {}
        self._step_time = StepTimeEstimate()
        self._turn = 0
        self._planned: deque[tuple[BatchKey | None, int]] = deque()  # key and work of the turns that `advance` is to come for
        self._planned_shape: LatentShape = (0, 0)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def queued_work_s(self) -> float:
        """The estimated seconds that all waiting and running samples take; 0 before any turn was measured."""
        work = sum(waiting.work for waiting in self._queue.all()) + sum(running.work_left for running in self._running.values())
        return self._step_time.seconds_for(work) or 0.0

    @property
    def planned_shape(self) -> LatentShape:
        """The latent height and width of the turn that was planned last; zeros where nothing steps."""
        return self._planned_shape

    def add(self, request: Request, now: float) -> Position:
        """Queue every image of a request, or none.

        Raises:
            QueueFullError: the queue is too long, in samples or in seconds.
            DeadlineExceededError: by the step time estimate the deadline cannot be kept.
        """
        count, free = request.params.num_images_per_prompt, self._capacity.max_slots - len(self._running)
        if len(self._queue) + count > self._max_waiting_samples + max(0, free):
            raise QueueFullError(
                f"{len(self._queue)} images are waiting already, at most {self._max_waiting_samples} may",
                self._until_fewer(len(self._queue) + count - self._max_waiting_samples),
            )
        entries = self._queue.entries_for(request)
        position = self._position(self._queue.ahead_of(entries[0]))
        wait_s = position.estimated_wait_s or 0.0
        if wait_s > self._max_waiting_s:
            raise QueueFullError(
                f"the queue is {wait_s:.0f} s long already, it may be at most {self._max_waiting_s:g} s",
                max(MIN_RETRY_S, wait_s - self._max_waiting_s),
            )
        if request.deadline is not None:
            self._refuse_if_hopeless(request, wait_s, request.deadline - now)
            self._deadlines[request.id] = request.deadline
        self._queue.push(request, entries)
        return position

    def drop(self, request_id: str) -> None:
        """Forget a request; its running samples leave in the next plan. Unknown ids are ignored."""
        self._deadlines.pop(request_id, None)
        self._queue.remove(request_id)
        for sample_id in [s for s in (*self._running, *self._decoding) if s.request_id == request_id]:
            self._release(sample_id)
            self._leaving.append(sample_id)

    def expire(self, now: float) -> set[str]:
        """Drop requests past their deadline, and name them."""
        late = {request_id for request_id, deadline in self._deadlines.items() if deadline <= now}
        for request_id in late:
            self.drop(request_id)
        return late

    def plan(self) -> StepPlan | None:
        """The next turn, or None when there is nothing to do."""
        joins = self._fill_slots()
        leaves, self._leaving = tuple(self._leaving), []
        key = next(iter(self._groups), None)
        group = list(self._groups[key].values()) if key is not None else []
        self._planned_shape = group[0].request.params.latent_shape if group else (0, 0)
        previews = self._due_previews(group)
        steps = tuple(running.sample.id for running in group)
        if key is not None:
            self._groups[key] = self._groups.pop(key)
            for running in group:
                self._count_planned(running)
        room = min(self._capacity.max_decodes, self._capacity.max_slots - len(self._decoding))
        decodes = tuple(islice(self._finished, max(0, room)))
        for sample_id in decodes:
            self._decoding[sample_id] = self._finished.pop(sample_id)
            del self._running[sample_id]
        if not (steps or decodes or leaves):
            return None
        self._planned.append((key, sum(running.request.params.work_per_call for running in group)))
        return StepPlan(joins=joins, steps=steps, previews=previews, decodes=decodes, leaves=leaves)

    def advance(self, progress: Iterable[SampleProgress], elapsed_s: float) -> None:
        """Take in what the first turn that has not been advanced achieved, and how long it took.

        Raises:
            EngineError: a sample's count of UNet calls is not the scheduler's.
        """
        self._turn += 1
        key, work = self._planned.popleft()
        if key is not None:
            self._step_time.add_turn(key, work, elapsed_s)
        for one in progress:
            running = self._running.get(one.id) or self._decoding.get(one.id)
            if running is not None:
                self._take_progress(running, one)

    def end(self, progress: SampleProgress) -> None:
        """Forget a sample whose picture or error has come, also after its turn. Unknown ones are ignored."""
        if progress.id in self._running or progress.id in self._decoding:
            self._release(progress.id)
            if progress.error is not None:
                self._leaving.append(progress.id)  # a turn with it may have been planned already

    def positions(self) -> list[tuple[str, Position]]:
        """Where each request is of which no image has started. One pass over the queue; not for every turn."""
        ahead = self._queue.firsts()
        started = {sample_id.request_id for sample_id in (*self._running, *self._decoding)}
        return [(request_id, self._position(before)) for request_id, before in ahead if request_id not in started]

    def remaining_s(self, sample_id: SampleId) -> float | None:
        """The estimated seconds for the UNet calls that a sample has left; None before any turn was measured."""
        running = self._running.get(sample_id) or self._decoding.get(sample_id)
        if running is None:
            return None
        interval_s = self._step_time.interval_s(self._groups)
        return None if interval_s is None else interval_s * (running.request.num_calls - running.step)

    def _fill_slots(self) -> tuple[Sample, ...]:
        joins = []
        while len(self._queue) and len(self._running) < self._capacity.max_slots:
            sample, request = self._queue.pop()
            running = self._running[sample.id] = RunningSample(sample, request)
            self._groups.setdefault(request.params.batch_key, {})[sample.id] = running
            joins.append(sample)
        return tuple(joins)

    def _due_previews(self, group: list[RunningSample]) -> tuple[SampleId, ...]:
        waited_longest: tuple[int, int] | None = None
        for index, running in enumerate(group):
            every, step = running.request.preview_every, running.num_planned + 1
            if every is None or step == running.request.num_calls:
                continue
            if running.preview_due_since is None and step % every == 0:
                running.preview_due_since = self._turn
            if running.preview_due_since is not None:
                waited_longest = min(waited_longest or (self._turn + 1, 0), (running.preview_due_since, index))
        if waited_longest is None:
            return ()
        chosen = group[waited_longest[1]]
        chosen.preview_due_since = None
        return (chosen.sample.id,)

    def _count_planned(self, running: RunningSample) -> None:
        running.num_planned += 1
        if running.num_planned == running.request.num_calls:
            self._leave_group(running)
            self._finished[running.sample.id] = running

    def _take_progress(self, running: RunningSample, progress: SampleProgress) -> None:
        if progress.is_over:
            self.end(progress)
            return
        running.step += 1
        if (progress.step, progress.num_steps) != (running.step, running.request.num_calls):
            planned = f"{running.step} of {running.request.num_calls}"
            raise EngineError(f"a sample is at step {progress.step} of {progress.num_steps}, planned was {planned}")

    def _release(self, sample_id: SampleId) -> None:
        running = self._running.pop(sample_id, None) or self._decoding.pop(sample_id)
        self._finished.pop(sample_id, None)
        self._leave_group(running)
        request_id = sample_id.request_id
        started = (*self._running, *self._decoding)
        if request_id not in self._queue and not any(other.request_id == request_id for other in started):
            self._deadlines.pop(request_id, None)

    def _leave_group(self, running: RunningSample) -> None:
        key = running.request.params.batch_key
        if (group := self._groups.get(key)) is not None:
            group.pop(running.sample.id, None)
            if not group:
                del self._groups[key]

    def _position(self, ahead: list[QueuedSample]) -> Position:
        if len(self._running) + len(ahead) < self._capacity.max_slots:
            return Position(len(ahead), 0.0)
        next_end = min((running.work_left for running in self._running.values()), default=0)
        wait_s = self._step_time.seconds_for(sum(waiting.work for waiting in ahead))
        interval_s = self._step_time.interval_s(self._groups)
        if wait_s is None or interval_s is None:
            return Position(len(ahead), None)
        calls = min((r.request.num_calls - r.step for r in self._running.values()), default=0) if next_end else 0
        return Position(len(ahead), wait_s + calls * interval_s)

    def _until_fewer(self, count: int) -> float:
        """The estimated seconds until `count` of the waiting samples have started: when a refused caller should retry."""
        whole_s = self._step_time.seconds_for(sum(waiting.work for waiting in self._queue.all())) or 0.0
        return max(MIN_RETRY_S, whole_s * min(1.0, count / max(1, len(self._queue))))

    def _refuse_if_hopeless(self, request: Request, wait_s: float, left_s: float) -> None:
        """An idle engine is judged by its fastest turn so far, so that one slow turn does not refuse all later requests."""
        key, is_idle = request.params.batch_key, not self._running and not len(self._queue)
        interval_s = self._step_time.fastest_s(key) if is_idle else self._step_time.interval_s({*self._groups, key})
        if (needed_s := wait_s + request.num_calls * (interval_s or 0.0)) > left_s:
            raise DeadlineExceededError(f"this takes about {needed_s:.3g} s here, and {max(0.0, left_s):.3g} s are left")

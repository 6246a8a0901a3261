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
  - Samples of batch requests give way to all others (`batch.py`). Nothing that is estimated or refused counts them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from mii_serve.errors import DeadlineExceededError, EngineError, QueueFullError
from mii_serve.scheduler.batch import BatchWork
from mii_serve.scheduler.queue import QueuedSample, SampleQueue
from mii_serve.scheduler.running import Groups, RunningSample, due_previews
from mii_serve.scheduler.step_time import StepTimeEstimate
from mii_serve.types import BatchKey, EngineCapacity, LatentShape, Priority, Request, Sample, SampleId, SampleProgress, StepPlan

MIN_RETRY_S = 0.1
"""The shortest `retry_after_s` of a refusal, in seconds: of the order of a turn on a GPU, and at most ten retries a second."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a request is in the queue; `estimated_wait_s` is None before any turn was measured, and for batch requests."""

    num_samples_ahead: int
    estimated_wait_s: float | None


class Scheduler:
    """Every `plan` has its `advance`, in the same order, and may come before the last one's. Call anything else at any time."""

    def __init__(
        self, capacity: EngineCapacity, *, max_waiting_samples: int, max_waiting_s: float, batch_share: float = 0.0
    ) -> None:
        """`batch_share` is the part of all work that batch requests get while others keep the engine busy."""
        self._capacity = capacity
        self._max_waiting_samples, self._max_waiting_s = max_waiting_samples, max_waiting_s
        self._queue = SampleQueue()
        self.batch = BatchWork(batch_share)
        self._running: dict[SampleId, RunningSample] = {}
        self._num_others = 0  # running samples that are not of batch requests
        self._groups = Groups()  # of all that do not give way
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
        """Without those of batch requests."""
        return len(self._queue)

    @property
    def queued_work_s(self) -> float:
        """The estimated seconds that all waiting and running samples take, without those of batch requests.

        0 before any turn was measured.
        """
        work = sum(waiting.work for waiting in self._queue.all()) + sum(running.work_left for running in self._others())
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
        is_batch = request.priority is Priority.BATCH
        queue, num_held = (self.batch.queue, len(self._running)) if is_batch else (self._queue, self._num_others)
        count, free = request.params.num_images_per_prompt, self._capacity.max_slots - num_held
        if len(queue) + count > self._max_waiting_samples + max(0, free):
            raise QueueFullError(
                f"{len(queue)} images are waiting already, at most {self._max_waiting_samples} may",
                self._until_fewer(queue, len(queue) + count - self._max_waiting_samples),
            )
        entries = queue.entries_for(request)
        ahead = queue.ahead_of(entries[0])
        position = Position(len(ahead), None) if is_batch else self._position(ahead)
        wait_s = position.estimated_wait_s or 0.0
        if wait_s > self._max_waiting_s:
            raise QueueFullError(
                f"the queue is {wait_s:.0f} s long already, it may be at most {self._max_waiting_s:g} s",
                max(MIN_RETRY_S, wait_s - self._max_waiting_s),
            )
        if request.deadline is not None:
            if not is_batch:
                self._refuse_if_hopeless(request, wait_s, request.deadline - now)
            self._deadlines[request.id] = request.deadline
        queue.push(request, entries)
        return position

    def drop(self, request_id: str) -> None:
        """Forget a request; its running samples leave in the next plan. Unknown ids are ignored."""
        self._deadlines.pop(request_id, None)
        self._queue.remove(request_id)
        self.batch.queue.remove(request_id)
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
        group, filling, work = self._samples_to_step()
        self._planned_shape = group[0].request.params.latent_shape if group else (0, 0)
        key = group[0].request.params.batch_key if group else None
        previews = due_previews(group, self._turn)
        stepping = [*group, *filling]
        for running in stepping:
            self._count_planned(running)
        room = min(self._capacity.max_decodes, self._capacity.max_slots - len(self._decoding))
        decodes = tuple(islice(self._finished, max(0, room)))
        for sample_id in decodes:
            del self._finished[sample_id]
            self._decoding[sample_id] = self._give_up_slot(sample_id)
        if not (joins or stepping or decodes or leaves):
            return None
        self._planned.append((key, work))
        steps = tuple(running.sample.id for running in stepping)
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
        started = {sample_id.request_id for sample_id in (*self._running, *self._decoding)}
        positions = [(request_id, self._position(ahead)) for request_id, ahead in self._queue.firsts()]
        positions += [(request_id, Position(len(ahead), None)) for request_id, ahead in self.batch.queue.firsts()]
        return [(request_id, position) for request_id, position in positions if request_id not in started]

    def remaining_s(self, sample_id: SampleId) -> float | None:
        """The estimated seconds for the UNet calls that a sample has left.

        None before any turn was measured, and for a sample that gives way.
        """
        running = self._running.get(sample_id) or self._decoding.get(sample_id)
        if running is None or running.gives_way:
            return None
        interval_s = self._step_time.interval_s(self._groups.keys)
        return None if interval_s is None else interval_s * (running.request.num_calls - running.step)

    def _fill_slots(self) -> tuple[Sample, ...]:
        """Give free slots to the waiting samples, and those of batch samples to others."""
        joins = []
        # Before any leaves its slot, so that none that leaves is paid for: it would join again in the same plan.
        while self._has_others and (paid := self.batch.pay()) is not None:
            self._groups.add(paid)
        for running in self.batch.to_leave(len(self._queue) - self._num_free):
            self._leave_slot(running)
        if self._num_free and self._has_others and self.batch.pay_for_first():
            joins.append(self._join(self.batch.queue, is_paid=True))
        while len(self._queue) and self._num_free and self._may_join(self._queue, joins):
            joins.append(self._join(self._queue))
        # Beside others a batch sample joins only where it may fill a bucket: encoding its prompt would delay them.
        if not self._has_others or self._capacity.buckets:
            while len(self.batch.queue) and self._num_free and self._may_join(self.batch.queue, joins):
                joins.append(self._join(self.batch.queue))
        return tuple(joins)

    def _may_join(self, queue: SampleQueue, joins: list[Sample]) -> bool:
        """Not with more images to encode than are decoded in one go: the others wait for them in this turn."""
        if (first := queue.first_request) is None or not _has_image_to_encode(first):
            return True
        return sum(map(_has_image_to_encode, joins)) < self._capacity.max_decodes

    def _join(self, queue: SampleQueue, *, is_paid: bool = False) -> Sample:
        sample, request = queue.pop()
        running = self._running[sample.id] = RunningSample(sample, request, is_paid=is_paid)
        self._num_others += not running.is_batch
        self._groups_of(running).add(running)
        return sample

    def _give_up_slot(self, sample_id: SampleId) -> RunningSample:
        running = self._running.pop(sample_id)
        self._num_others -= not running.is_batch
        return running

    def _leave_slot(self, running: RunningSample) -> None:
        """Let a batch sample wait again for a slot."""
        self._give_up_slot(running.sample.id)
        self.batch.parked.remove(running)
        self.batch.put_back(running)
        self._leaving.append(running.sample.id)

    def _samples_to_step(self) -> tuple[list[RunningSample], list[RunningSample], int]:
        """The group that has waited longest of those whose turn it may be, the batch samples that fill its padding, and the
        work by which the turn is measured."""
        if not self._has_others:
            return self._batch_group(), [], 0  # how long a turn takes is measured where a caller waits for it
        if (key := self._groups.first_key) is None:
            return [], [], 0
        self._groups.had_turn(key)
        group = self._groups.of(key)
        self.batch.earn(sum(running.request.params.work_per_call for running in group if not running.is_batch))
        work = sum(running.request.params.work_per_call for running in group)
        return group, self.batch.filling(group, self._capacity), work

    def _batch_group(self) -> list[RunningSample]:
        """What batch samples do while no others run. They make their last call only in the turn in which their pictures are
        given to the decoder, and do not fill it, so that none holds up the pictures of others."""
        for running in self._groups.all():  # there is no other to give way to
            running.is_paid = False
            self._groups.remove(running)
            self.batch.parked.add(running)
        num_decodes = min(self._capacity.max_decodes, self._capacity.max_slots)
        return self.batch.alone(num_decodes - len(self._finished) - len(self._decoding))

    def _groups_of(self, running: RunningSample) -> Groups:
        return self.batch.parked if running.gives_way else self._groups

    @property
    def _has_others(self) -> bool:
        """Whether a sample that is not of a batch request runs or waits, or its picture is being decoded."""
        return bool(self._num_others or len(self._queue)) or any(not one.is_batch for one in self._decoding.values())

    @property
    def _num_free(self) -> int:
        return self._capacity.max_slots - len(self._running)

    def _others(self) -> list[RunningSample]:
        """The running samples that are not of batch requests."""
        return [running for running in self._running.values() if not running.is_batch]

    def _count_planned(self, running: RunningSample) -> None:
        running.num_planned += 1
        if not running.num_to_plan:
            self._groups_of(running).remove(running)
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
        running = self._give_up_slot(sample_id) if sample_id in self._running else self._decoding.pop(sample_id)
        self._finished.pop(sample_id, None)
        self._groups_of(running).remove(running)
        request_id = sample_id.request_id
        is_waiting = request_id in self._queue or request_id in self.batch.queue
        if not is_waiting and not any(other.request_id == request_id for other in (*self._running, *self._decoding)):
            self._deadlines.pop(request_id, None)

    def _position(self, ahead: list[QueuedSample]) -> Position:
        if self._num_others + len(ahead) < self._capacity.max_slots:
            return Position(len(ahead), 0.0)
        others = self._others()
        next_end = min((running.work_left for running in others), default=0)
        wait_s = self._step_time.seconds_for(sum(waiting.work for waiting in ahead))
        interval_s = self._step_time.interval_s(self._groups.keys)
        if wait_s is None or interval_s is None:
            return Position(len(ahead), None)
        calls = min((r.request.num_calls - r.step for r in others), default=0) if next_end else 0
        return Position(len(ahead), wait_s + calls * interval_s)

    def _until_fewer(self, queue: SampleQueue, count: int) -> float:
        """The estimated seconds until `count` of the waiting samples have started: when a refused caller should retry."""
        whole_s = self._step_time.seconds_for(sum(waiting.work for waiting in queue.all())) or 0.0
        return max(MIN_RETRY_S, whole_s * min(1.0, count / max(1, len(queue))))

    def _refuse_if_hopeless(self, request: Request, wait_s: float, left_s: float) -> None:
        """An idle engine is judged by its fastest turn so far, so that one slow turn does not refuse all later requests."""
        key, is_idle = request.params.batch_key, not self._num_others and not len(self._queue)
        interval_s = self._step_time.fastest_s(key) if is_idle else self._step_time.interval_s({*self._groups.keys, key})
        if (needed_s := wait_s + request.num_calls * (interval_s or 0.0)) > left_s:
            raise DeadlineExceededError(f"this takes about {needed_s:.3g} s here, and {max(0.0, left_s):.3g} s are left")


def _has_image_to_encode(one: Request | Sample) -> bool:
    return one.input_image is not None and one.encoded_image is None

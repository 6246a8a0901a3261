"""Batch requests: work that gives way to all other work, and fills what the others leave idle.

The rules:
  - A batch sample keeps its slot and its latents, and makes no step in a turn in which a sample of another priority runs, or
    beside which the picture of one is decoded.
  - It fills the padding of a captured batch shape, which costs the others nothing; but not with its last call, and without
    previews.
  - It makes its last call when the decoder has room for its picture: none holds a slot, or keeps the decoder busy, for long.
  - It leaves its slot when another sample waits for one, the one with the fewest steps first; it starts again later, before
    other batch samples.
  - While others run, batch work earns a share of what they do. A sample whose remaining work has been earned is paid for: it
    runs as any other sample does, to its end.
"""

from __future__ import annotations

from collections.abc import Sequence

from mii_serve.scheduler.queue import SampleQueue
from mii_serve.scheduler.running import Groups, RunningSample
from mii_serve.types import BatchShape, EngineCapacity, Request, choose_bucket

DECODE_CALLS = 2
"""What decoding an image costs, in guided UNet calls of that image; for Stable Diffusion v1 by count of operations."""


class BatchWork:
    """The waiting and the parked samples of batch requests, and what they have earned."""

    def __init__(self, share: float) -> None:
        """`share` is the part of all work that batch requests get on a busy server, from 0 to below 1."""
        self.queue = SampleQueue()
        self.parked = Groups()
        """Running samples that give way, also while there is no other to give way to."""
        self.num_restarted = 0
        """How often a sample has left its slot to another one, to begin again later."""
        self._earned_per_work = share / (1 - share)
        self._earned = 0.0

    @property
    def num_waiting(self) -> int:
        return len(self.queue)

    @property
    def num_parked(self) -> int:
        return len(self.parked.all())

    def pay(self) -> RunningSample | None:
        """The next parked sample whose remaining work has been earned; it is paid for from here on."""
        cheapest = min(self.parked.all(), key=_cost, default=None)
        if cheapest is None or not self._take(_cost(cheapest)):
            return None
        cheapest.is_paid = True
        self.parked.remove(cheapest)
        return cheapest

    def pay_for_first(self) -> bool:
        """Whether the whole work of the first waiting sample has been earned; it is paid for from here on."""
        if self.parked or (request := self.queue.first_request) is None:
            return False  # one that has a slot already gets the share
        return self._take(_cost_of(request, request.num_calls))

    def earn(self, others_work: int) -> None:
        """Note what others do in a turn. No more is earned than the dearest sample that is there costs."""
        costs = [_cost(running) for running in self.parked.all()]
        if (first := self.queue.first_request) is not None:
            costs.append(_cost_of(first, first.num_calls))
        self._earned = min(self._earned + others_work * self._earned_per_work, max(costs, default=0))

    def to_leave(self, count: int) -> list[RunningSample]:
        """As many samples that lose least by leaving their slots."""
        return sorted(self.parked.all(), key=_num_planned)[: max(0, count)]

    def alone(self, num_last_calls: int) -> list[RunningSample]:
        """The samples that step where no others run, at most so many of them for the last time.

        It is the turn of the key that has waited longest of those with such samples.
        """
        for key in self.parked.keys:
            group = self.parked.of(key)
            ending = [running for running in group if running.num_to_plan == 1]
            stays = {running.sample.id for running in ending[max(0, num_last_calls) :]}
            if stepping := [running for running in group if running.sample.id not in stays]:
                self.parked.had_turn(key)
                return stepping
        return []

    def put_back(self, running: RunningSample) -> None:
        self.num_restarted += 1
        self.queue.put_back(running.sample, running.request)

    def filling(self, group: Sequence[RunningSample], capacity: EngineCapacity) -> list[RunningSample]:
        """The parked samples that fit into the padding of this group's batch, the most advanced ones first."""
        if not group or not capacity.buckets:
            return []
        has_fixed_rows = capacity.has_fixed_rows
        if (bucket := choose_bucket(capacity.buckets, _shape_of(group), has_fixed_rows=has_fixed_rows)) is None:
            return []
        found: list[RunningSample] = []
        candidates = self.parked.of(group[0].request.params.batch_key)
        for running in sorted(candidates, key=_num_planned, reverse=True):
            is_last_call = running.num_to_plan == 1  # the image would have to be decoded
            if not is_last_call and bucket.holds(_shape_of([*group, *found, running]), has_fixed_rows=has_fixed_rows):
                found.append(running)
        return found

    def _take(self, cost: int) -> bool:
        if self._earned < cost:
            return False
        self._earned -= cost
        return True


def _num_planned(running: RunningSample) -> int:
    return running.num_planned


def _cost(running: RunningSample) -> int:
    return _cost_of(running.request, running.num_to_plan)


def _cost_of(request: Request, num_calls: int) -> int:
    return (num_calls + DECODE_CALLS) * request.params.work_per_call


def _shape_of(group: Sequence[RunningSample]) -> BatchShape:
    height, width = group[0].request.params.latent_shape
    return BatchShape(len(group), sum(running.request.params.num_rows for running in group), height, width)

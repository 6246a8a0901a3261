"""The samples that hold a slot, and the groups of them that can share a UNet call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mii_serve.types import BatchKey, Priority, Request, Sample, SampleId


@dataclass(slots=True, eq=False)
class RunningSample:
    """A sample that has started: `num_planned` of its UNet calls are planned, and `step` of them are known to be made.

    `preview_due_since` is the turn since which a preview of it is due. `is_paid`: a sample of a batch request whose work is
    taken from the share of batch requests.
    """

    sample: Sample
    request: Request
    num_planned: int = 0
    step: int = 0
    preview_due_since: int | None = None
    is_paid: bool = False

    @property
    def num_to_plan(self) -> int:
        """The UNet calls that are not planned yet."""
        return self.request.num_calls - self.num_planned

    @property
    def work_left(self) -> int:
        return (self.request.num_calls - self.step) * self.request.params.work_per_call

    @property
    def is_batch(self) -> bool:
        return self.request.priority is Priority.BATCH

    @property
    def gives_way(self) -> bool:
        """Whether it makes no step while a sample of another priority runs."""
        return self.is_batch and not self.is_paid


class Groups:
    """Running samples by batch key. The key that has waited longest for a turn comes first."""

    def __init__(self) -> None:
        self._groups: dict[BatchKey, dict[SampleId, RunningSample]] = {}

    def __bool__(self) -> bool:
        return bool(self._groups)

    @property
    def keys(self) -> list[BatchKey]:
        return list(self._groups)

    @property
    def first_key(self) -> BatchKey | None:
        return next(iter(self._groups), None)

    def of(self, key: BatchKey) -> list[RunningSample]:
        return list(self._groups.get(key, {}).values())

    def all(self) -> list[RunningSample]:
        return [running for group in self._groups.values() for running in group.values()]

    def add(self, running: RunningSample) -> None:
        self._groups.setdefault(running.request.params.batch_key, {})[running.sample.id] = running

    def remove(self, running: RunningSample) -> None:
        key = running.request.params.batch_key
        if (group := self._groups.get(key)) is not None:
            group.pop(running.sample.id, None)
            if not group:
                del self._groups[key]

    def had_turn(self, key: BatchKey) -> None:
        if key in self._groups:
            self._groups[key] = self._groups.pop(key)


def due_previews(group: Sequence[RunningSample], turn: int) -> tuple[SampleId, ...]:
    """The one preview of this turn: that of the sample which has waited longest for it."""
    waited_longest: tuple[int, int] | None = None
    for index, running in enumerate(group):
        every, step = running.request.preview_every, running.num_planned + 1
        if every is None or step == running.request.num_calls:
            continue
        if running.preview_due_since is None and step % every == 0:
            running.preview_due_since = turn
        if running.preview_due_since is not None:
            waited_longest = min(waited_longest or (turn + 1, 0), (running.preview_due_since, index))
    if waited_longest is None:
        return ()
    chosen = group[waited_longest[1]]
    chosen.preview_due_since = None
    return (chosen.sample.id,)

"""The order of those who wait: weighted fair queueing between callers, first come first served within one.

Self-clocked fair queueing (Golestani, "A Self-Clocked Fair Queueing Scheme for Broadband Applications", INFOCOM 1994). Each
(client, priority) is a flow. A sample's tag is its work over its priority's weight, added to the later of its flow's last tag
and the line's clock, which is the tag of whoever was let in last; the smallest tag goes first. A caller with five hundred
requests thus delays a caller with one by about one sample, and low priority is slowed, never starved.

The callers of one address (`ADDRESS/NAME`) share that address's part: with k of them in line a sample counts k times. So a name
made up for each request gains nothing: the n-th counts as the n-th request of one caller does.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from mii_serve.types import Priority, Request, Sample, SampleId

WEIGHTS = {Priority.HIGH: 16.0, Priority.NORMAL: 4.0, Priority.LOW: 1.0}
"""Shares of a busy server: of three callers with one priority each, the high one gets sixteen twenty-firsts."""

Flow = tuple[str, Priority]


@dataclass(slots=True, order=True)
class Waiting:
    """One sample in line; `tag` and then arrival decide."""

    tag: float
    depth: int
    """How many of its own flow were in line before it: of equal tags, those of who waits for least go first."""
    arrival: int
    sample: Sample = field(compare=False)
    request: Request = field(compare=False)
    start: float = field(compare=False)
    """Where its flow would be without it."""
    is_gone: bool = field(default=False, compare=False)

    @property
    def work(self) -> int:
        return self.request.num_calls * self.request.params.work_per_call


class Line:
    """Samples that wait for a slot. Nothing here is slower than logarithmic but `ahead_of` and `firsts`."""

    def __init__(self) -> None:
        self._heap: list[Waiting] = []
        self._of_request: dict[str, list[Waiting]] = {}
        self._last_tag: dict[Flow, float] = {}
        self._waiting: dict[Flow, dict[str, int]] = {}  # by address: how many samples each of its clients has in line
        self._clock = 0.0
        self._num_arrived = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._of_request

    def entries_for(self, request: Request) -> list[Waiting]:
        """What `push` would put in line, one entry for each image."""
        waiting = self._waiting.get(_address_of(request), {})
        depth, num_clients = waiting.get(request.client, 0), len(waiting.keys() | {request.client})
        share = num_clients * request.num_calls * request.params.work_per_call / WEIGHTS[request.priority]
        start = max(self._clock, self._last_tag.get((request.client, request.priority), 0.0))
        return [
            Waiting(
                start + (i + 1) * share,
                depth + i,
                self._num_arrived + i,
                Sample(id=SampleId(request.id, i), params=request.params),
                request,
                start + i * share,
            )
            for i in range(request.params.num_images_per_prompt)
        ]

    def push(self, request: Request, entries: list[Waiting]) -> None:
        self._last_tag[request.client, request.priority] = entries[-1].tag
        self._of_request[request.id] = entries
        self._num_arrived += len(entries)
        self._count_waiting(request, len(entries))
        for entry in entries:
            heapq.heappush(self._heap, entry)

    def pop(self) -> tuple[Sample, Request]:
        """Let the next one in; the line must not be empty."""
        while (entry := heapq.heappop(self._heap)).is_gone:
            pass
        self._clock = entry.tag
        self._forget(entry)
        self._reset_if_empty()
        return entry.sample, entry.request

    def remove(self, request_id: str) -> None:
        """Take a request out. Its flow gets back what it did not use."""
        if not (entries := self._of_request.pop(request_id, [])):
            return
        for entry in entries:
            entry.is_gone = True
        self._count_waiting(entries[0].request, -len(entries))
        flow = entries[0].request.client, entries[0].request.priority
        if self._last_tag.get(flow) == entries[-1].tag:
            self._last_tag[flow] = entries[0].start
        self._forget_past(flow)
        if len(self._heap) > 2 * self._count + 64:
            self._heap = self.all()
            heapq.heapify(self._heap)
        self._reset_if_empty()

    def all(self) -> list[Waiting]:
        """In no order."""
        return [entry for entry in self._heap if not entry.is_gone]

    def ahead_of(self, newcomer: Waiting) -> list[Waiting]:
        return [entry for entry in self.all() if entry < newcomer]

    def firsts(self) -> list[tuple[str, list[Waiting]]]:
        """Each waiting request, and who is before its first image."""
        order = sorted(self.all())
        seen: dict[str, list[Waiting]] = {}
        for index, entry in enumerate(order):
            if entry.sample.id.request_id not in seen:
                seen[entry.sample.id.request_id] = order[:index]
        return list(seen.items())

    def _forget(self, entry: Waiting) -> None:
        entry.is_gone = True
        self._count_waiting(entry.request, -1)
        entries = self._of_request[entry.request.id]
        entries.remove(entry)
        if not entries:
            del self._of_request[entry.request.id]
        self._forget_past((entry.request.client, entry.request.priority))

    def _count_waiting(self, request: Request, change: int) -> None:
        self._count += change
        address = _address_of(request)
        waiting = self._waiting.setdefault(address, {})
        waiting[request.client] = waiting.get(request.client, 0) + change
        if not waiting[request.client]:
            del waiting[request.client]
        if not waiting:
            del self._waiting[address]

    def _forget_past(self, flow: Flow) -> None:
        if self._last_tag.get(flow, 0.0) <= self._clock:
            self._last_tag.pop(flow, None)

    def _reset_if_empty(self) -> None:
        """An empty line has no past: nobody is owed anything, and the clock cannot grow for ever."""
        if not self._count:
            self._heap.clear()
            self._last_tag.clear()
            self._clock = 0.0


def _address_of(request: Request) -> Flow:
    return request.client.partition("/")[0], request.priority

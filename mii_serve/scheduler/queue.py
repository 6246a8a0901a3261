"""The queue of samples that wait for a slot: weighted fair queueing between callers, first come first served within one.

Self-clocked fair queueing (Golestani, "A Self-Clocked Fair Queueing Scheme for Broadband Applications", INFOCOM 1994). Each
(client, priority) is a flow. A sample's tag is its work over its priority's weight, added to the later of its flow's last tag
and the queue's clock, which is the tag of the last sample that got a slot; the smallest tag goes first. A caller with five
hundred requests thus delays a caller with one by about one sample, and low priority is slowed, never starved.

The callers of one address (`ADDRESS/NAME`) share that address's part: with k of them in the queue a sample counts k times. So a
new name for each request gains nothing: the n-th counts as the n-th request of one caller does.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from mii_serve.types import Priority, Request, Sample, SampleId

WEIGHTS = {Priority.HIGH: 16.0, Priority.NORMAL: 4.0, Priority.LOW: 1.0, Priority.BATCH: 1.0}
"""Shares of a busy server, a factor of four apart: of three callers with a priority each, the high one gets 16 of 21.

Batch requests have a queue of their own, in which all are equal.
"""

Flow = tuple[str, Priority]
"""A client, or its address, and a priority."""


@dataclass(slots=True, order=True)
class QueuedSample:
    """One waiting sample, ordered by `tag`, then `depth`, then `arrival`.

    The tag is in work (rows × latent pixels × UNet calls) over weight. `depth` is how many samples of its flow waited before
    it: of equal tags, the flow with the fewest goes first. `start` is its flow's last tag without it.
    """

    tag: float
    depth: int
    arrival: int
    sample: Sample = field(compare=False)
    request: Request = field(compare=False)
    start: float = field(compare=False)
    is_removed: bool = field(default=False, compare=False)

    @property
    def work(self) -> int:
        return self.request.num_calls * self.request.params.work_per_call


class SampleQueue:
    """Every operation takes logarithmic time in the number of samples, but `all`, `ahead_of` and `firsts`."""

    def __init__(self) -> None:
        self._heap: list[QueuedSample] = []
        self._of_request: dict[str, list[QueuedSample]] = {}
        self._last_tag: dict[Flow, float] = {}
        self._waiting: dict[Flow, dict[str, int]] = {}  # by address: the number of waiting samples of each of its clients
        self._clock = 0.0
        self._num_arrived = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._of_request

    def entries_for(self, request: Request) -> list[QueuedSample]:
        """The entries to `push`, one for each image."""
        waiting = self._waiting.get(_address_of(request), {})
        depth, num_clients = waiting.get(request.client, 0), len(waiting.keys() | {request.client})
        share = num_clients * request.num_calls * request.params.work_per_call / WEIGHTS[request.priority]
        start = max(self._clock, self._last_tag.get((request.client, request.priority), 0.0))
        return [
            QueuedSample(
                start + (i + 1) * share,
                depth + i,
                self._num_arrived + i,
                Sample(
                    id=SampleId(request.id, i),
                    params=request.params,
                    input_image=request.input_image,
                    encoded_image=request.encoded_image,
                ),
                request,
                start + i * share,
            )
            for i in range(request.params.num_images_per_prompt)
        ]

    @property
    def first_request(self) -> Request | None:
        """The request of the sample that `pop` returns."""
        while self._heap and self._heap[0].is_removed:
            heapq.heappop(self._heap)
        return self._heap[0].request if self._heap else None

    def put_back(self, sample: Sample, request: Request) -> None:
        """Let a sample that had been popped wait again, before all that wait since."""
        entry = QueuedSample(self._clock, -1, self._num_arrived, sample, request, self._clock)
        self._num_arrived += 1
        self._of_request.setdefault(request.id, []).insert(0, entry)
        self._count_waiting(request, 1)
        heapq.heappush(self._heap, entry)

    def push(self, request: Request, entries: list[QueuedSample]) -> None:
        self._last_tag[request.client, request.priority] = entries[-1].tag
        self._of_request[request.id] = entries
        self._num_arrived += len(entries)
        self._count_waiting(request, len(entries))
        for entry in entries:
            heapq.heappush(self._heap, entry)

    def pop(self) -> tuple[Sample, Request]:
        """Remove the first sample; the queue must not be empty."""
        while (entry := heapq.heappop(self._heap)).is_removed:
            pass
        self._clock = entry.tag
        self._forget(entry)
        self._reset_if_empty()
        return entry.sample, entry.request

    def remove(self, request_id: str) -> None:
        """Remove a request's samples. Its flow's last tag goes back where it can, as if it had not been added."""
        if not (entries := self._of_request.pop(request_id, [])):
            return
        for entry in entries:
            entry.is_removed = True
        self._count_waiting(entries[0].request, -len(entries))
        flow = entries[0].request.client, entries[0].request.priority
        if self._last_tag.get(flow) == entries[-1].tag:
            self._last_tag[flow] = entries[0].start
        self._forget_past(flow)
        if len(self._heap) > 2 * self._count + 64:
            self._heap = self.all()
            heapq.heapify(self._heap)
        self._reset_if_empty()

    def all(self) -> list[QueuedSample]:
        """In no order."""
        return [entry for entry in self._heap if not entry.is_removed]

    def ahead_of(self, entry: QueuedSample) -> list[QueuedSample]:
        return [other for other in self.all() if other < entry]

    def firsts(self) -> list[tuple[str, list[QueuedSample]]]:
        """Each waiting request, and the samples ahead of its first image."""
        order = sorted(self.all())
        seen: dict[str, list[QueuedSample]] = {}
        for index, entry in enumerate(order):
            if entry.sample.id.request_id not in seen:
                seen[entry.sample.id.request_id] = order[:index]
        return list(seen.items())

    def _forget(self, entry: QueuedSample) -> None:
        entry.is_removed = True
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
        """Start again when the queue is empty: no flow is owed anything, and the clock cannot grow without bound."""
        if not self._count:
            self._heap.clear()
            self._last_tag.clear()
            self._clock = 0.0


def _address_of(request: Request) -> Flow:
    return request.client.partition("/")[0], request.priority

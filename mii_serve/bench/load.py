"""Asks a server for pictures and times the answers. Its clock is the event loop's.

In an open loop requests start when they are meant to, whatever became of those before. `max_in_flight` bounds how many are
under way; one that has to wait for that is late, and its time counts all the same. In a closed loop each of N callers asks
again as soon as it has its answer: that measures what a server can do, and says little about how long others would wait for
it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from mii_serve.bench.values import BAD_ANSWER, DEADLINE_EXCEEDED, NOT_SENT, OK, Answer, PlannedRequest, Record

GRACE_S = 5.0
"""Longer than its deadline nobody waits for a driver that does not come back."""


class Driver(Protocol):
    """Speaks one protocol with one server."""

    async def ask(self, request: PlannedRequest, timeout_s: float) -> Answer:
        """Send the request and see it through; failures are answers too."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Where a load ends: no request starts after `duration_s` or beyond `max_requests`, and none is waited for longer than
    `timeout_s`.
    """

    duration_s: float | None = None
    max_requests: int | None = None
    timeout_s: float = 120.0
    max_in_flight: int = 256


OnAnswer = Callable[[PlannedRequest, Answer, Record], None]


class _Books:
    def __init__(self, driver: Driver, timeout_s: float, on_answer: OnAnswer | None) -> None:
        self._driver, self._timeout_s, self._on_answer = driver, timeout_s, on_answer
        self._clock = asyncio.get_running_loop().time
        self.start = self._clock()
        self.records: list[Record] = []

    async def make(self, request: PlannedRequest, intended_s: float, gate: asyncio.Semaphore | None = None) -> None:
        """See one request through, from waiting its turn to its record."""
        deadline = self.start + intended_s + self._timeout_s
        sent_at: float | None = None
        answer = Answer(code=NOT_SENT, text="other requests were under way for as long as it could wait")
        try:
            async with asyncio.timeout_at(deadline + GRACE_S):
                if gate is None:
                    sent_at = self._clock()
                    answer = await self._driver.ask(request, self._timeout_s)
                else:
                    async with asyncio.timeout_at(deadline):
                        await gate.acquire()
                    try:
                        sent_at = self._clock()
                        if (left_s := deadline - sent_at) > 0:
                            answer = await self._driver.ask(request, left_s)
                    finally:
                        gate.release()
        except TimeoutError:
            if sent_at is not None:
                answer = Answer(code=DEADLINE_EXCEEDED, text="no answer, not even after the deadline")
        ended_at = self._clock()
        if answer.code == OK and (wrong := _what_is_wrong(request, answer)):
            answer = Answer(code=BAD_ANSWER, text=wrong)
        intended_at = self.start + intended_s

        def since(moment: float | None) -> float | None:
            return None if moment is None else round(moment - intended_at, 6)

        record = Record(
            index=request.index,
            kind=request.kind,
            num_images=request.num_images,
            intended_s=round(intended_s, 6),
            sent_s=round((ended_at if sent_at is None else sent_at) - self.start, 6),
            ended_s=round(ended_at - self.start, 6),
            code=answer.code,
            queue_s=since(answer.started_at),
            first_step_s=since(answer.first_step_at),
            first_preview_s=since(answer.first_preview_at),
        )
        self.records.append(record)
        if self._on_answer is not None:
            self._on_answer(request, answer, record)


async def open_loop(
    driver: Driver, schedule: Iterable[tuple[float, PlannedRequest]], bounds: Bounds, on_answer: OnAnswer | None = None
) -> list[Record]:
    """Start each request at its time; the records are in the order the requests ended."""
    books = _Books(driver, bounds.timeout_s, on_answer)
    gate = asyncio.Semaphore(bounds.max_in_flight)
    clock = asyncio.get_running_loop().time
    async with asyncio.TaskGroup() as calls:
        for count, (at_s, request) in enumerate(schedule):
            if count == bounds.max_requests or (bounds.duration_s is not None and at_s >= bounds.duration_s):
                break
            if (pause_s := books.start + at_s - clock()) > 0:
                await asyncio.sleep(pause_s)
            calls.create_task(books.make(request, at_s, gate))
    return books.records


async def closed_loop(
    driver: Driver,
    requests: Iterator[PlannedRequest],
    num_callers: int,
    bounds: Bounds,
    on_answer: OnAnswer | None = None,
) -> list[Record]:
    """Keep `num_callers` requests under way; a caller is meant to ask again the moment it has its answer."""
    books = _Books(driver, bounds.timeout_s, on_answer)
    clock = asyncio.get_running_loop().time
    num_begun = 0

    async def caller() -> None:
        nonlocal num_begun
        while bounds.max_requests is None or num_begun < bounds.max_requests:
            now_s = clock() - books.start
            if bounds.duration_s is not None and now_s >= bounds.duration_s:
                return
            if (request := next(requests, None)) is None:
                return
            num_begun += 1
            await books.make(request, now_s)
            if not books.records[-1].is_ok:
                await asyncio.sleep(0.01)  # a server that refuses at once is not to be asked in a tight loop

    async with asyncio.TaskGroup() as callers:
        for _ in range(num_callers):
            callers.create_task(caller())
    return books.records


def _what_is_wrong(request: PlannedRequest, answer: Answer) -> str:
    """Why the pictures cannot be those that were asked for, by their number and size; empty when they can."""
    if len(answer.pictures) != request.num_images:
        return f"{len(answer.pictures)} pictures, asked for {request.num_images}"
    asked = request.asked
    for picture in answer.pictures:
        try:
            size = picture.size()
        except (OSError, ValueError, SyntaxError) as error:
            return f"a picture cannot be read: {error}"
        if asked.width is not None and size != (asked.width, asked.height):
            return f"a picture is {size[0]}x{size[1]}, asked for {asked.width}x{asked.height}"
    return ""

"""Sends requests through a driver and records the answers. Its clock is the event loop's.

In an open loop, requests start at their times, whether or not earlier ones have ended. `max_in_flight` limits how many are in
flight; a request that waits for that is late, and the wait counts. In a closed loop, each of N callers sends its next request
when it has its answer: that measures a server's capacity, and not the latency that independent callers would see.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from mii_serve.bench.values import BAD_ANSWER, DEADLINE_EXCEEDED, NOT_SENT, OK, Answer, PlannedRequest, Record

GRACE_S = 5.0
"""Seconds after its deadline at which a request is given up whose driver has not returned."""


class Driver(Protocol):
    """Sends requests to one server over one protocol."""

    async def ask(self, request: PlannedRequest, timeout_s: float) -> Answer:
        """Send the request and wait for its answer, for at most `timeout_s` seconds; failures are answers, too."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadLimits:
    """No request starts after `duration_s` seconds or after `max_requests` others; `timeout_s` is each request's deadline, in
    seconds from the moment it was meant to start.
    """

    duration_s: float | None = None
    max_requests: int | None = None
    timeout_s: float = 120.0
    max_in_flight: int = 256


OnAnswer = Callable[[PlannedRequest, Answer, Record], None]


class _Recorder:
    def __init__(self, driver: Driver, timeout_s: float, on_answer: OnAnswer | None) -> None:
        self._driver, self._timeout_s, self._on_answer = driver, timeout_s, on_answer
        self._clock = asyncio.get_running_loop().time
        self.start = self._clock()
        self.records: list[Record] = []

    async def run(self, request: PlannedRequest, intended_s: float, gate: asyncio.Semaphore | None = None) -> None:
        """Send one request when `gate` admits it, wait for its answer, and record both."""
        deadline = self.start + intended_s + self._timeout_s
        sent_at: float | None = None
        answer = Answer(code=NOT_SENT, text="other requests were in flight until its deadline")
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
        if answer.code == OK and (error := _content_error(request, answer)):
            answer = Answer(code=BAD_ANSWER, text=error)
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
    driver: Driver, schedule: Iterable[tuple[float, PlannedRequest]], limits: LoadLimits, on_answer: OnAnswer | None = None
) -> list[Record]:
    """Start each request at its time. The records are in the order in which the requests ended."""
    recorder = _Recorder(driver, limits.timeout_s, on_answer)
    gate = asyncio.Semaphore(limits.max_in_flight)
    clock = asyncio.get_running_loop().time
    async with asyncio.TaskGroup() as calls:
        for count, (at_s, request) in enumerate(schedule):
            if count == limits.max_requests or (limits.duration_s is not None and at_s >= limits.duration_s):
                break
            if (pause_s := recorder.start + at_s - clock()) > 0:
                await asyncio.sleep(pause_s)
            calls.create_task(recorder.run(request, at_s, gate))
    return recorder.records


async def closed_loop(
    driver: Driver,
    requests: Iterator[PlannedRequest],
    num_callers: int,
    limits: LoadLimits,
    on_answer: OnAnswer | None = None,
) -> list[Record]:
    """Keep `num_callers` requests in flight; a caller's next request is meant to start when its last one ends."""
    recorder = _Recorder(driver, limits.timeout_s, on_answer)
    clock = asyncio.get_running_loop().time
    num_started = 0

    async def caller() -> None:
        nonlocal num_started
        while limits.max_requests is None or num_started < limits.max_requests:
            now_s = clock() - recorder.start
            if limits.duration_s is not None and now_s >= limits.duration_s:
                return
            if (request := next(requests, None)) is None:
                return
            num_started += 1
            await recorder.run(request, now_s)
            if not recorder.records[-1].is_ok:
                await asyncio.sleep(0.01)  # or a server that refuses at once would be asked in a tight loop

    async with asyncio.TaskGroup() as callers:
        for _ in range(num_callers):
            callers.create_task(caller())
    return recorder.records


def _content_error(request: PlannedRequest, answer: Answer) -> str:
    """How the pictures' number or size differs from the request; empty if they agree."""
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

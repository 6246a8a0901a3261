"""Which replica makes which image, and what becomes of the images of a replica that is lost.

An image is a pure function of its parameters, and image i of a request is image 0 of the same request with seed + i. So a
request can be parted between replicas, and what a lost replica had is made again elsewhere from the start: the caller sees a
later answer, never another one. What was on a replica that crashed is a suspect and is made again alone (`assignment.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace

import grpc

from mii_serve.errors import (
    DeadlineExceededError,
    EngineLostError,
    MiiServeError,
    PoisonedRequestError,
    QueueFullError,
    UnavailableError,
)
from mii_serve.proto.codec import encode_request
from mii_serve.proto.interceptor import CLIENT_ID_KEY, REQUEST_ID_KEY
from mii_serve.proto.status import decode_error
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.server.assignment import Evidence, empty_for_suspects, not_reserved, shares
from mii_serve.server.link import Connection, Loss, ReplicaLink
from mii_serve.tracing import TRACEPARENT_KEY, current_traceparent
from mii_serve.types import GenerationParams, OutputOptions, Priority

logger = logging.getLogger(__name__)

MAX_LOSSES = 20
"""Replicas of any kind of end that a request may see; a machine that loses so many is not serving."""
VERDICT_TIMEOUT_S = 10.0
"""For the supervisor to say how a replica ended."""
_NUMBERS = itertools.count(1)
MERGE_BUFFER = 8
"""Events of a parted request that wait for a slow caller; then the replicas keep them."""
MAX_WAITING = 4096
"""New requests that wait here while no replica takes any; those after them are refused."""
COME_AGAIN_S = 2.0
"""What those are told: with a spare process, a lost replica takes work again after about so long."""
MAX_REMEMBERED = 1024
"""Kinds of request that are made alone from the start, because one like them has crashed replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A checked request on its way to replicas. `deadline` is on `time.monotonic`'s clock.

    `request_id` is what the caller calls it, and perhaps others of theirs; towards replicas each part gets an id of its own.
    """

    request_id: str
    client: str
    params: GenerationParams
    output: OutputOptions
    priority: Priority
    deadline: float | None

    @property
    def left_s(self) -> float | None:
        return None if self.deadline is None else self.deadline - time.monotonic()


@dataclass(slots=True, eq=False)
class _Part:
    """Images `first` to `first + count - 1` of a call, made by one replica. `left` counts each one's UNet calls to go."""

    call: Call
    first: int
    count: int
    left: dict[int, int] = field(default_factory=dict)
    delivered: set[int] = field(default_factory=set)
    started: bool = False
    evidence: Evidence = field(default_factory=Evidence)
    account: _Account | None = None

    @property
    def indexes(self) -> range:
        return range(self.first, self.first + self.count)

    def new_request_id(self) -> str:
        """New each time it is asked for: a replica may not have noticed yet that an earlier attempt was given up."""
        return f"{self.call.request_id} {next(_NUMBERS)}"

    @property
    def params(self) -> GenerationParams:
        params = self.call.params
        return replace(params, seed=params.seed_of(self.first), num_images_per_prompt=self.count)

    def release(self) -> None:
        """Give its place on a replica back, if it has one."""
        account, self.account = self.account, None
        if account is not None:
            account.close()


class _ReplicaLostError(Exception):
    """Internal: the stream of a part broke with its replica. `was_alone`: nothing else was on it when the first one broke."""

    def __init__(self, connection: Connection) -> None:
        connection.note_break()
        self.connection = connection
        self.was_alone = connection.num_running_at_break == 1


@dataclass(slots=True, eq=False)
class _Waiter:
    """A request that waits for replicas; `take` is told which ones, at once when they are there."""

    take: Callable[[Sequence[Connection]], None]
    served: asyncio.Future[None]


def _metadata(part: _Part) -> tuple[tuple[str, str], ...]:
    traceparent = current_traceparent.get()
    trace = () if traceparent is None else ((TRACEPARENT_KEY, traceparent),)
    return ((REQUEST_ID_KEY, part.new_request_id()), (CLIENT_ID_KEY, part.call.client), *trace)


class Router:
    """Sends work to the replica that has least of it left."""

    def __init__(self, num_replicas: int = 1, *, patience_s: float = 120.0) -> None:
        """`patience_s` is how long a request waits for any replica to come back when all are lost."""
        self.links = [ReplicaLink(index) for index in range(num_replicas)]
        self._patience_s = patience_s
        self._waiting: dict[_Waiter, None] = {}
        self._suspects: dict[_Waiter, None] = {}
        self._down_since: float | None = time.monotonic()
        self._poisoned: OrderedDict[int, None] = OrderedDict()

    @property
    def is_up(self) -> bool:
        return any(link.is_up for link in self.links)

    def serve_waiting(self) -> None:
        """Give replicas to those who wait for some. Called whenever a replica comes, goes or has less to do."""
        up = [connection for link in self.links if (connection := link.connection)]
        if up:
            self._down_since = None
        elif self._down_since is None:
            self._down_since = time.monotonic()
        for waiter, empty in list(zip(self._suspects, empty_for_suspects(up, len(self._suspects)), strict=False)):
            _serve(self._suspects, waiter, [empty])
        if free := not_reserved(up, len(self._suspects)):
            for waiter in list(self._waiting):
                _serve(self._waiting, waiter, free)

    async def events(self, call: Call) -> AsyncGenerator[pb.GenerateEvent, None]:
        """All events of the call, `done` last. Leaving the iteration early cancels the work.

        Raises:
            MiiServeError: what the replicas refused, in their words.
            UnavailableError: no replica came back in time.
            PoisonedRequestError: replicas crash under it.
        """
        accepted_at, started_at, done = time.monotonic(), None, None
        parts: list[_Part] = []
        try:
            await self._part(call, parts)
            async with contextlib.aclosing(self._merged(parts)) as events:
                async for event in events:
                    kind = event.WhichOneof("event")
                    event.request_id = call.request_id
                    if kind == "started":
                        started_at = started_at or time.monotonic()
                    if kind == "done":
                        done = event
                    else:
                        yield event
        except PoisonedRequestError:
            self._remember(call.params)
            raise
        finally:
            for part in parts:
                part.release()
        assert done is not None
        self._poisoned.pop(_kind_of(call.params), None)
        done.done.parameters.seed = call.params.seed
        done.done.parameters.num_images_per_prompt = call.params.num_images_per_prompt
        done.done.timings.queued_s = (started_at or time.monotonic()) - accepted_at
        done.done.timings.total_s = time.monotonic() - accepted_at
        yield done

    async def _part(self, call: Call, parts: list[_Part]) -> None:
        """Part the images between replicas, neighbours together, and book each part where it will be made."""
        num_images = call.params.num_images_per_prompt
        if _kind_of(call.params) in self._poisoned:
            parts.append(_Part(call, 0, num_images, evidence=Evidence(num_crashes=1, is_suspect=True)))
            return
        if len(self._waiting) >= MAX_WAITING:
            raise QueueFullError(f"{MAX_WAITING} requests wait for a replica already", COME_AGAIN_S)

        def take(replicas: Sequence[Connection]) -> None:
            first = 0
            for replica, count in shares(replicas, num_images, call.params.work_per_call * call.params.num_inference_steps):
                parts.append(_Part(call, first, count))
                self._book(parts[-1], replica)
                first += count

        await self._served(call, self._waiting, take)

    def _remember(self, params: GenerationParams) -> None:
        self._poisoned[_kind_of(params)] = None
        while len(self._poisoned) > MAX_REMEMBERED:
            self._poisoned.popitem(last=False)

    async def _merged(self, parts: Sequence[_Part]) -> AsyncGenerator[pb.GenerateEvent, None]:
        if len(parts) == 1:
            async with contextlib.aclosing(self._made(parts[0])) as events:
                async for event in events:
                    yield event
            return
        queue: asyncio.Queue[tuple[_Part, pb.GenerateEvent] | MiiServeError | None] = asyncio.Queue(MERGE_BUFFER)

        async def feed(part: _Part) -> None:
            try:
                async with contextlib.aclosing(self._made(part)) as events:
                    async for event in events:
                        await queue.put((part, event))
                await queue.put(None)
            except MiiServeError as error:
                await queue.put(error)

        tasks = [asyncio.create_task(feed(part)) for part in parts]
        try:
            num_left, is_queued = len(parts), False
            while num_left:
                news = await queue.get()
                if isinstance(news, MiiServeError):
                    raise news
                if news is None:
                    num_left -= 1
                    continue
                part, event = news
                if event.HasField("queued"):
                    # One place in line for the caller: whoever tells one first, then that of the first image.
                    if is_queued and part.first != 0:
                        continue
                    is_queued = True
                yield event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _made(self, part: _Part) -> AsyncGenerator[pb.GenerateEvent, None]:
        """A part's events, on as many replicas as it takes."""
        while True:
            account = part.account or await self._booked(part)
            try:
                async with contextlib.aclosing(self._on(account, part)) as events:
                    async for event in events:
                        yield event
                return
            except _ReplicaLostError as lost:
                self._judge(part, await self._verdict(lost.connection), was_alone=lost.was_alone)
            again = [index for index in part.indexes if index not in part.delivered]
            yield pb.GenerateEvent(restarted=pb.GenerateEvent.Restarted(image_indexes=again))

    async def _on(self, account: _Account, part: _Part) -> AsyncGenerator[pb.GenerateEvent, None]:
        """A part's events from the replica that it is booked on."""
        connection = account.connection
        call = connection.stub.GenerateStream(
            encode_request(part.params, part.call.output, part.call.priority),
            timeout=part.call.left_s,
            metadata=_metadata(part),
        )
        try:
            async for event in call:
                if _place(event, part):
                    account.update()
                    yield event
        except grpc.aio.AioRpcError as error:
            refusal = decode_error(error.code(), error.details() or "", error.trailing_metadata())
            # Nobody but us can cancel this call: CANCELLED means that its channel was closed with a lost replica.
            is_lost = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            raise (_ReplicaLostError(connection) if is_lost or isinstance(refusal, EngineLostError) else refusal) from error
        except asyncio.CancelledError:
            # That, too, may look as if somebody had cancelled us.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise _ReplicaLostError(connection) from None
        finally:
            call.cancel()  # the caller may have gone away in the middle
            part.release()

    async def _booked(self, part: _Part) -> _Account:
        """Wait for a replica and book the part there: the one with the least work or, for a suspect, one of its own."""
        line = self._suspects if part.evidence.is_suspect else self._waiting
        await self._served(part.call, line, lambda replicas: self._book(part, min(replicas, key=lambda r: r.work)))
        assert part.account is not None
        return part.account

    def _book(self, part: _Part, connection: Connection) -> None:
        part.left = dict.fromkeys(part.indexes, part.call.params.num_inference_steps)
        part.started = False
        part.account = _Account(connection, part, on_close=self.serve_waiting)

    async def _served(self, call: Call, line: dict[_Waiter, None], take: Callable[[Sequence[Connection]], None]) -> None:
        """Wait in this line until `take` has been told its replicas.

        Raises:
            DeadlineExceededError: the call's time ran out.
            UnavailableError: there was no replica at all for too long. A busy one is waited for.
        """
        waiter, entered_at = _Waiter(take, asyncio.get_running_loop().create_future()), time.monotonic()
        line[waiter] = None
        self.serve_waiting()
        try:
            while not waiter.served.done():
                left_s, patience_s = call.left_s, self._patience_s
                if self._down_since is not None:
                    patience_s -= time.monotonic() - max(entered_at, self._down_since)
                if left_s is not None and left_s <= 0:
                    raise DeadlineExceededError("no replica was ready in time")
                if patience_s <= 0:
                    raise UnavailableError(f"no replica came back within {self._patience_s:g} s")
                await asyncio.wait((waiter.served,), timeout=patience_s if left_s is None else min(patience_s, left_s))
        finally:
            if line.pop(waiter, waiter) is None:
                self.serve_waiting()  # a replica may have been kept empty for this one

    async def _verdict(self, connection: Connection) -> Loss:
        connection.note_break()
        self.serve_waiting()
        try:
            return await asyncio.wait_for(asyncio.shield(connection.lost), VERDICT_TIMEOUT_S)
        except TimeoutError:  # its process lives, or the supervisor would have said so by now
            if await connection.answers():
                connection.is_broken, connection.num_running_at_break = False, None
                self.serve_waiting()
            return Loss(reason="its connection broke, and nobody knows why", is_crash=False)

    def _judge(self, part: _Part, loss: Loss, *, was_alone: bool) -> None:
        """Note a loss against the part, and refuse it when it is to blame."""
        evidence = part.evidence
        is_to_blame = evidence.add(is_crash=loss.is_crash, was_alone=was_alone, had_started=part.started)
        logger.warning("a replica was lost (%s), request_id=%s is made again", loss.reason, part.call.request_id)
        if is_to_blame:
            raise PoisonedRequestError(
                f"{evidence.num_losses} replicas crashed while they worked on this request, last: {loss.reason}"
            )
        if evidence.num_losses >= MAX_LOSSES:
            raise UnavailableError(f"{evidence.num_losses} replicas were lost during this request, last: {loss.reason}")


def _serve(line: dict[_Waiter, None], waiter: _Waiter, replicas: Sequence[Connection]) -> None:
    del line[waiter]
    waiter.take(replicas)
    waiter.served.set_result(None)


def _kind_of(params: GenerationParams) -> int:
    """The same for requests that differ in nothing but their seeds and number of images."""
    return hash(replace(params, seed=0, num_images_per_prompt=1))


class _Account:
    """Keeps a connection's work in step with what a part has left, and the connection to itself if the part is a suspect."""

    def __init__(self, connection: Connection, part: _Part, on_close: Callable[[], None]) -> None:
        self.connection = connection
        self._part, self._on_close, self._booked = part, on_close, 0
        connection.num_running += 1
        connection.is_isolated = part.evidence.is_suspect
        self.update()

    def update(self) -> None:
        self._book(sum(self._part.left.values()) * self._part.call.params.work_per_call)

    def close(self) -> None:
        self._book(0)
        self.connection.num_running -= 1
        self.connection.is_isolated = False
        self._on_close()

    def _book(self, work: int) -> None:
        self.connection.work += work - self._booked
        self._booked = work


def _place(event: pb.GenerateEvent, part: _Part) -> bool:
    """Give the event the index its image has in the whole request; False for news of an image already delivered."""
    kind = event.WhichOneof("event")
    if kind in ("queued", "done"):
        return True
    if kind == "image":
        event.image.index = index = event.image.index + part.first
        is_new = index not in part.delivered
        part.delivered.add(index)
        part.left[index] = 0
        return is_new
    inner = getattr(event, str(kind))
    inner.image_index = index = inner.image_index + part.first
    part.started = True
    if kind == "step":
        part.left[index] = event.step.num_steps - event.step.step
    return index not in part.delivered

"""Which replica makes which image, and what becomes of the images of a replica that is lost.

An image is a pure function of its parameters, and image i of a request is image 0 of the same request with seed + i. So a
request can be parted between replicas, and what a lost replica had is made again elsewhere from the start: the caller sees a
later answer, never another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace

import grpc

from mii_serve.errors import (
    DeadlineExceededError,
    EngineLostError,
    MiiServeError,
    PoisonedRequestError,
    UnavailableError,
)
from mii_serve.proto.codec import encode_request
from mii_serve.proto.interceptor import CLIENT_ID_KEY, REQUEST_ID_KEY
from mii_serve.proto.status import decode_error
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.server.link import Connection, Loss, ReplicaLink
from mii_serve.tracing import TRACEPARENT_KEY, current_traceparent
from mii_serve.types import GenerationParams, OutputOptions, Priority

logger = logging.getLogger(__name__)

MAX_BLAME = 2
"""Replicas that may crash under a request before it is refused."""
MAX_LOSSES = 20
"""Replicas of any kind of end that a request may see; a machine that loses so many is not serving."""
VERDICT_TIMEOUT_S = 10.0
"""For the supervisor to say how a replica ended."""
_NUMBERS = itertools.count(1)
MERGE_BUFFER = 8
"""Events of a parted request that wait for a slow caller; then the replicas keep them."""


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
    blame: int = 0
    num_losses: int = 0

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


class _ReplicaLostError(Exception):
    """Internal: the stream of a part broke with its replica. `was_alone`: nothing else was on it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.was_alone = connection.num_running == 1


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
        self._changed = asyncio.Condition()

    @property
    def is_up(self) -> bool:
        return any(link.is_up for link in self.links)

    async def announce_change(self) -> None:
        """A replica was attached or detached: those who wait for one look again."""
        async with self._changed:
            self._changed.notify_all()

    async def events(self, call: Call) -> AsyncGenerator[pb.GenerateEvent, None]:
        """All events of the call, `done` last. Leaving the iteration early cancels the work.

        Raises:
            MiiServeError: what the replicas refused, in their words.
            UnavailableError: no replica came back in time.
            PoisonedRequestError: replicas crash under it.
        """
        accepted_at, started_at, done = time.monotonic(), None, None
        parts = await self._parts(call)
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
        assert done is not None
        done.done.parameters.seed = call.params.seed
        done.done.parameters.num_images_per_prompt = call.params.num_images_per_prompt
        done.done.timings.queued_s = (started_at or time.monotonic()) - accepted_at
        done.done.timings.total_s = time.monotonic() - accepted_at
        yield done

    async def _parts(self, call: Call) -> list[_Part]:
        """Give each image to whoever would have least to do, so that none finishes late; neighbours stay together."""
        await self._any_up(call)
        up = [link for link in self.links if link.is_up]
        work = {link.index: link.work for link in up}
        counts = dict.fromkeys(work, 0)
        for _ in range(call.params.num_images_per_prompt):
            index = min(work, key=lambda index: (work[index], counts[index]))
            counts[index] += 1
            work[index] += call.params.work_per_call * call.params.num_inference_steps
        parts, first = [], 0
        for count in counts.values():
            if count:
                parts.append(_Part(call, first, count))
                first += count
        return parts

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
            connection = await self._least_busy(part.call)
            try:
                async with contextlib.aclosing(self._on(connection, part)) as events:
                    async for event in events:
                        yield event
                return
            except _ReplicaLostError as lost:
                self._judge(part, await self._verdict(lost.connection), was_alone=lost.was_alone)
            again = [index for index in part.indexes if index not in part.delivered]
            yield pb.GenerateEvent(restarted=pb.GenerateEvent.Restarted(image_indexes=again))

    async def _on(self, connection: Connection, part: _Part) -> AsyncGenerator[pb.GenerateEvent, None]:
        """A part's events from one replica, its work on that replica's account meanwhile."""
        params = part.params
        part.left = dict.fromkeys(part.indexes, params.num_inference_steps)
        part.started = False
        account = _Account(connection, part)
        call = connection.stub.GenerateStream(
            encode_request(params, part.call.output, part.call.priority),
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
            account.close()

    async def _least_busy(self, call: Call) -> Connection:
        await self._any_up(call)
        return min((up for link in self.links if (up := link.connection)), key=lambda connection: connection.work)

    async def _any_up(self, call: Call) -> None:
        if self.is_up:
            return
        left_s = call.left_s
        patience_s = self._patience_s if left_s is None else min(self._patience_s, left_s)
        try:
            async with asyncio.timeout(patience_s), self._changed:
                await self._changed.wait_for(lambda: self.is_up)
        except TimeoutError:
            if left_s is not None and left_s <= patience_s:
                raise DeadlineExceededError("no replica was ready in time") from None
            raise UnavailableError(f"no replica came back within {self._patience_s:g} s") from None

    async def _verdict(self, connection: Connection) -> Loss:
        connection.is_suspect = True
        try:
            return await asyncio.wait_for(asyncio.shield(connection.lost), VERDICT_TIMEOUT_S)
        except TimeoutError:  # its process lives, or the supervisor would have said so by now
            if await connection.answers():
                connection.is_suspect = False
                await self.announce_change()
            return Loss(reason="its connection broke, and nobody knows why", is_crash=False)

    def _judge(self, part: _Part, loss: Loss, *, was_alone: bool) -> None:
        """Count a loss against the part if it was running; refuse it when it is to blame for too many.

        A kill from outside is nobody's fault, unless there was nobody else: the kernel kills who takes too much memory.
        """
        part.num_losses += 1
        part.blame += part.started and (loss.is_crash or was_alone)
        logger.warning("a replica was lost (%s), request_id=%s is made again", loss.reason, part.call.request_id)
        if part.blame >= MAX_BLAME:
            raise PoisonedRequestError(f"{part.blame} replicas crashed while they worked on this request, last: {loss.reason}")
        if part.num_losses >= MAX_LOSSES:
            raise UnavailableError(f"{part.num_losses} replicas were lost during this request, last: {loss.reason}")


class _Account:
    """Keeps a connection's work in step with what a part has left."""

    def __init__(self, connection: Connection, part: _Part) -> None:
        self._connection, self._part, self._booked = connection, part, 0
        connection.num_running += 1
        self.update()

    def update(self) -> None:
        self._book(sum(self._part.left.values()) * self._part.call.params.work_per_call)

    def close(self) -> None:
        self._book(0)
        self._connection.num_running -= 1

    def _book(self, work: int) -> None:
        self._connection.work += work - self._booked
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

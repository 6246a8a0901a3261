"""Which replica makes which image, and what becomes of the images of a replica that is lost.

An image is a pure function of its parameters, and image i of a request is image 0 of the same request with seed + i. So a
request can be divided between replicas, and what a lost replica had is made again elsewhere from the start: the caller gets a
later answer, never another one. What was on a replica that crashed is a suspect and is made again alone (`assignment.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace

from mii_serve.errors import (
    DeadlineExceededError,
    PoisonedRequestError,
    QueueFullError,
    UnavailableError,
)
from mii_serve.server.assignment import Evidence, empty_for_suspects, load_of, not_reserved, shares
from mii_serve.server.call import CallContext
from mii_serve.server.replica_client import Loss, Order, ReplicaClient, ReplicaConnection, ReplicaLostError
from mii_serve.tracing import current_traceparent
from mii_serve.types import (
    Done,
    Event,
    GenerationParams,
    ImageReady,
    Preview,
    Priority,
    Queued,
    ResolvedRequest,
    Restarted,
    Started,
    Step,
)

logger = logging.getLogger(__name__)

MAX_LOSSES = 20
"""Replicas of any kind of end that a request may see; a machine that loses so many is not serving."""
VERDICT_TIMEOUT_S = 10.0
"""For the supervisor to say how a replica ended."""
MERGE_BUFFER = 8
"""Events of a parted request that wait for a slow caller; then the replicas keep them."""
MAX_WAITING = 4096
"""New requests that wait here while no replica takes any; those after them are refused."""
RETRY_AFTER_S = 2.0
"""In their refusal: with a spare process, a lost replica takes work again after about so long."""
MAX_REMEMBERED = 1024
"""Kinds of request that are made alone from the start, because one like them has crashed replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A resolved request on its way to replicas. Without `has_steps` no `Step` events are wanted.

    The call's request id is the caller's name for it, and perhaps for others.
    """

    request: ResolvedRequest
    call: CallContext
    has_steps: bool = True

    @property
    def params(self) -> GenerationParams:
        return self.request.params

    @property
    def is_batch(self) -> bool:
        return self.request.priority is Priority.BATCH


@dataclass(slots=True, eq=False)
class _Part:
    """Images `first` to `first + count - 1` of a request, made by one replica."""

    work: Work
    first: int
    count: int
    delivered: set[int] = field(default_factory=set)
    started: bool = False
    evidence: Evidence = field(default_factory=Evidence)
    account: _Account | None = None

    @property
    def indexes(self) -> range:
        return range(self.first, self.first + self.count)

    @property
    def params(self) -> GenerationParams:
        params = self.work.params
        return replace(params, seed=params.seed_of(self.first), num_images_per_prompt=self.count)

    def release(self) -> None:
        """Give its place on a replica back, if it has one."""
        account, self.account = self.account, None
        if account is not None:
            account.close()


@dataclass(slots=True, eq=False)
class _Waiter:
    """A request that waits for replicas; `take` is called with them as soon as they are there."""

    take: Callable[[Sequence[ReplicaConnection]], None]
    served: asyncio.Future[None]


class Router:
    """Sends work to the replica that has least of it left."""

    def __init__(self, num_replicas: int = 1, *, patience_s: float = 120.0) -> None:
        """`patience_s` is how long a request waits for any replica to come back when all are lost."""
        self.replicas = [ReplicaClient(index, self.serve_waiting) for index in range(num_replicas)]
        self._patience_s = patience_s
        self._waiting: dict[_Waiter, None] = {}
        self._suspects: dict[_Waiter, None] = {}
        self._down_since: float | None = time.monotonic()
        self._poisoned: OrderedDict[int, None] = OrderedDict()

    @property
    def is_up(self) -> bool:
        return any(replica.is_up for replica in self.replicas)

    def add(self) -> ReplicaClient:
        """One replica more, with the lowest index that is free. It gets work once it is attached."""
        taken = {replica.index for replica in self.replicas}
        index = next(index for index in range(len(taken) + 1) if index not in taken)
        added = ReplicaClient(index, self.serve_waiting)
        self.replicas = [*self.replicas, added]  # a new list, because others may be iterating over the old one
        return added

    async def remove(self, replica: ReplicaClient, loss: Loss) -> None:
        """Forget a replica. What still runs on it is made again elsewhere, as after any loss."""
        self.replicas = [other for other in self.replicas if other is not replica]
        await replica.detach(loss)
        self.serve_waiting()

    def serve_waiting(self) -> None:
        """Give replicas to those who wait for some. Called whenever a replica comes, goes or has less to do."""
        up = [connection for replica in self.replicas if (connection := replica.connection)]
        if up:
            self._down_since = None
        elif self._down_since is None:
            self._down_since = time.monotonic()
        for waiter, empty in list(zip(self._suspects, empty_for_suspects(up, len(self._suspects)), strict=False)):
            _serve(self._suspects, waiter, [empty])
        if free := not_reserved(up, len(self._suspects)):
            for waiter in list(self._waiting):
                _serve(self._waiting, waiter, free)

    async def events(self, work: Work) -> AsyncGenerator[Event, None]:
        """All events of the request, `Done` last. Leaving the iteration early cancels it.

        Raises:
            MiiServeError: what the replicas refused, in their words.
            UnavailableError: no replica came back in time.
            PoisonedRequestError: replicas crash under it.
        """
        accepted_at, started_at, done = time.monotonic(), None, None
        parts: list[_Part] = []
        try:
            await self._divide(work, parts)
            async with contextlib.aclosing(self._merged(parts)) as events:
                async for event in events:
                    if isinstance(event, Started):
                        started_at = started_at or time.monotonic()
                    if isinstance(event, Done):
                        done = event
                    else:
                        yield event
        except PoisonedRequestError:
            self._remember(work.params)
            raise
        finally:
            for part in parts:
                part.release()
        assert done is not None
        self._poisoned.pop(_kind_of(work.params), None)
        whole = replace(done.parameters, seed=work.params.seed, num_images_per_prompt=work.params.num_images_per_prompt)
        yield Done(
            parameters=whole,
            queued_s=(started_at or time.monotonic()) - accepted_at,
            total_s=time.monotonic() - accepted_at,
        )

    async def _divide(self, work: Work, parts: list[_Part]) -> None:
        """Divide the images between replicas, neighbours together, and book each part where it will be made."""
        num_images = work.params.num_images_per_prompt
        if _kind_of(work.params) in self._poisoned:
            parts.append(_Part(work, 0, num_images, evidence=Evidence(num_crashes=1, is_suspect=True)))
            return
        if len(self._waiting) >= MAX_WAITING:
            raise QueueFullError(f"{MAX_WAITING} requests wait for a replica already", RETRY_AFTER_S)

        def take(replicas: Sequence[ReplicaConnection]) -> None:
            first = 0
            work_per_image = work.params.work_per_call * work.params.num_steps
            for replica, count in shares(replicas, num_images, work_per_image, is_batch=work.is_batch):
                parts.append(_Part(work, first, count))
                self._book(parts[-1], replica)
                first += count

        await self._replicas_for(work, self._waiting, take)

    def _remember(self, params: GenerationParams) -> None:
        self._poisoned[_kind_of(params)] = None
        while len(self._poisoned) > MAX_REMEMBERED:
            self._poisoned.popitem(last=False)

    async def _merged(self, parts: Sequence[_Part]) -> AsyncGenerator[Event, None]:
        if len(parts) == 1:
            async with contextlib.aclosing(self._part_events(parts[0])) as events:
                async for event in events:
                    yield event
            return
        queue: asyncio.Queue[tuple[_Part, Event] | Exception | None] = asyncio.Queue(MERGE_BUFFER)

        async def feed(part: _Part) -> None:
            try:
                async with contextlib.aclosing(self._part_events(part)) as events:
                    async for event in events:
                        await queue.put((part, event))
                await queue.put(None)
            except Exception as error:  # noqa: BLE001 - raised again where the events are read
                await queue.put(error)

        tasks = [asyncio.create_task(feed(part)) for part in parts]
        try:
            num_left, is_queued = len(parts), False
            while num_left:
                news = await queue.get()
                if isinstance(news, Exception):
                    raise news
                if news is None:
                    num_left -= 1
                    continue
                part, event = news
                if isinstance(event, Queued):
                    # The caller has one place in the queue: the one that is known first, then that of the first image.
                    if is_queued and part.first != 0:
                        continue
                    is_queued = True
                yield event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _part_events(self, part: _Part) -> AsyncGenerator[Event, None]:
        """A part's events, on as many replicas as it takes."""
        while True:
            account = part.account or await self._booked(part)
            try:
                async with contextlib.aclosing(self._on(account, part)) as events:
                    async for event in events:
                        yield event
                return
            except ReplicaLostError as lost:
                self._judge(part, await self._verdict(lost.connection, part.work), was_alone=lost.was_alone)
            again = [index for index in part.indexes if index not in part.delivered]
            yield Restarted(image_indexes=tuple(again))

    async def _on(self, account: _Account, part: _Part) -> AsyncGenerator[Event, None]:
        """A part's events from the replica that it is booked on."""
        work = part.work

        def on_step(image_index: int, step: int, num_steps: int) -> None:
            part.started = True
            account.set_left(part.first + image_index, num_steps - step)

        order = Order(
            request_id=work.call.request_id,
            request=replace(work.request, params=part.params),
            client=work.call.client,
            left_s=work.call.left_s,
            traceparent=current_traceparent.get(),
            has_steps=work.has_steps,
            on_step=on_step,
        )
        try:
            async with contextlib.aclosing(account.connection.generate(order)) as events:
                async for event in events:
                    if isinstance(event, ImageReady):
                        account.set_left(part.first + event.image_index, 0)
                    if (placed := _placed(event, part)) is not None:
                        yield placed
        finally:
            part.release()

    async def _booked(self, part: _Part) -> _Account:
        """Wait for a replica and book the part there: the one with the least work or, for a suspect, one of its own."""
        queue = self._suspects if part.evidence.is_suspect else self._waiting
        await self._replicas_for(
            part.work,
            queue,
            lambda replicas: self._book(part, min(replicas, key=lambda r: load_of(r, is_batch=part.work.is_batch))),
        )
        assert part.account is not None
        return part.account

    def _book(self, part: _Part, connection: ReplicaConnection) -> None:
        part.started = False
        part.account = _Account(connection, part, on_close=self.serve_waiting)

    async def _replicas_for(
        self, work: Work, queue: dict[_Waiter, None], take: Callable[[Sequence[ReplicaConnection]], None]
    ) -> None:
        """Wait in this queue until `take` has been called with replicas.

        Raises:
            DeadlineExceededError: the request's time ran out.
            UnavailableError: there was no replica at all for too long. A busy one is waited for.
        """
        waiter, entered_at = _Waiter(take, asyncio.get_running_loop().create_future()), time.monotonic()
        queue[waiter] = None
        self.serve_waiting()
        try:
            while not waiter.served.done():
                left_s, patience_s = work.call.left_s, self._patience_s
                if self._down_since is not None:
                    patience_s -= time.monotonic() - max(entered_at, self._down_since)
                if left_s is not None and left_s <= 0:
                    raise DeadlineExceededError("no replica was ready in time")
                if patience_s <= 0:
                    raise UnavailableError(f"no replica came back within {self._patience_s:g} s")
                await asyncio.wait((waiter.served,), timeout=patience_s if left_s is None else min(patience_s, left_s))
        finally:
            if queue.pop(waiter, waiter) is None:
                self.serve_waiting()  # a replica may have been kept empty for this one

    async def _verdict(self, connection: ReplicaConnection, work: Work) -> Loss:
        connection.note_break()
        self.serve_waiting()
        left_s = work.call.left_s
        timeout_s = VERDICT_TIMEOUT_S if left_s is None else min(VERDICT_TIMEOUT_S, left_s)
        await asyncio.wait((connection.lost,), timeout=timeout_s)  # wait_for may swallow a caller's leaving before Python 3.12
        if connection.lost.done():
            return connection.lost.result()
        if timeout_s < VERDICT_TIMEOUT_S:
            raise DeadlineExceededError("the time ran out after a replica was lost")
        return Loss(reason="its connection broke for an unknown reason", is_crash=False)  # or its end were known by now

    def _judge(self, part: _Part, loss: Loss, *, was_alone: bool) -> None:
        """Note a loss against the part, and refuse it when it is to blame."""
        evidence = part.evidence
        is_to_blame = evidence.add(is_crash=loss.is_crash, was_alone=was_alone, had_started=part.started)
        logger.warning("a replica was lost (%s), request_id=%s is made again", loss.reason, part.work.call.request_id)
        if is_to_blame:
            raise PoisonedRequestError(
                f"{evidence.num_losses} replicas crashed while they worked on this request, last: {loss.reason}"
            )
        if evidence.num_losses >= MAX_LOSSES:
            raise UnavailableError(f"{evidence.num_losses} replicas were lost during this request, last: {loss.reason}")


def _serve(queue: dict[_Waiter, None], waiter: _Waiter, replicas: Sequence[ReplicaConnection]) -> None:
    del queue[waiter]
    waiter.take(replicas)
    waiter.served.set_result(None)


def _kind_of(params: GenerationParams) -> int:
    """The same for requests that differ in nothing but their seeds and number of images."""
    return hash(replace(params, seed=0, num_images_per_prompt=1))


class _Account:
    """Keeps a connection's work in step with what a part has left, and the connection to itself if the part is a suspect."""

    def __init__(self, connection: ReplicaConnection, part: _Part, on_close: Callable[[], None]) -> None:
        self.connection = connection
        self._work_per_call = part.params.work_per_call
        self._left = dict.fromkeys(part.indexes, part.params.num_steps)
        self._is_batch = part.work.is_batch
        self._on_close = on_close
        self._add(sum(self._left.values()))
        connection.num_running += 1
        connection.is_isolated = part.evidence.is_suspect

    def set_left(self, image_index: int, num_calls: int) -> None:
        """This image has so many UNet calls to go."""
        self._add(num_calls - self._left[image_index])
        self._left[image_index] = num_calls

    def _add(self, num_calls: int) -> None:
        if self._is_batch:
            self.connection.batch_work += num_calls * self._work_per_call
        else:
            self.connection.work += num_calls * self._work_per_call

    def close(self) -> None:
        for image_index in self._left:
            self.set_left(image_index, 0)
        self.connection.num_running -= 1
        self.connection.is_isolated = False
        self._on_close()


def _placed(event: Event, part: _Part) -> Event | None:
    """The event with the index that its image has in the whole request; None if it is about an image already delivered."""
    if not isinstance(event, Started | Step | Preview | ImageReady):
        return event
    index = event.image_index + part.first
    is_new = index not in part.delivered
    if isinstance(event, ImageReady):
        part.delivered.add(index)
    else:
        part.started = True
    if not is_new:
        return None
    return event if part.first == 0 else replace(event, image_index=index)

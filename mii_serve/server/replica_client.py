"""The front's side of one replica: its connection, the work it has, its description, and why it was lost.

A replica is reached at an address: the Unix socket of a process of this machine, or HOST:PORT with TLS and a token. All of its
work goes over one stream, and after each turn one report comes back for all of its samples (`proto/replica/replica.proto`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import grpc
from google.rpc import status_pb2

from mii_serve.errors import DeadlineExceededError, EngineLostError, UnavailableError
from mii_serve.proto.codec import CHANNEL_OPTIONS, decode_event, decode_lora, decode_server_info, encode_request
from mii_serve.proto.metadata import AUTHORIZATION_KEY
from mii_serve.proto.replica import replica_pb2 as pb
from mii_serve.proto.replica.replica_pb2_grpc import ReplicaStub
from mii_serve.proto.status import error_of
from mii_serve.replica.mailbox import Mailbox
from mii_serve.types import Done, Event, LoraInfo, ResolvedRequest, ServerInfo, Step

if TYPE_CHECKING:
    from mii_serve.proto.replica.replica_pb2_grpc import ReplicaAsyncStub

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

HELLO_TIMEOUT_S = 30.0
LOAD_TIMEOUT_S = 120.0
"""For a LoRA's files to be read, between two turns."""
PROBE_TIMEOUT_S = 5.0
PROBE_EVERY_S = 10.0
"""How often a replica whose stream broke is asked whether it is still there, until the supervisor says how it ended."""
REPLICA_CHANNEL_OPTIONS = (*CHANNEL_OPTIONS, ("grpc.client_idle_timeout_ms", 2**31 - 1))
"""A connection is kept as long as its replica lives: for another one, the socket's file may have been cleaned away."""
KEEPALIVE_MS = 10_000
"""How often a replica on another machine is pinged, and how long the answer may take: a machine that is gone says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaAddress:
    """`target` is gRPC's name of the address. Without `credentials` it is plain text, for a Unix socket."""

    target: str
    credentials: grpc.ChannelCredentials | None = None
    token: str | None = field(default=None, repr=False)

    @classmethod
    def socket(cls, path: Path) -> ReplicaAddress:
        return cls(target=f"unix:{path}")

    def channel(self) -> grpc.aio.Channel:
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.target, options=REPLICA_CHANNEL_OPTIONS)
        keepalive = (
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS),  # one minute without it, whatever keepalive_timeout_ms says
            ("grpc.http2.max_pings_without_data", 0),
        )
        return grpc.aio.secure_channel(self.target, self.credentials, options=(*REPLICA_CHANNEL_OPTIONS, *keepalive))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return () if self.token is None else ((AUTHORIZATION_KEY, f"Bearer {self.token}"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """How a replica ended. A crash speaks against what was running on it; a kill from outside does not."""

    reason: str
    is_crash: bool


class ReplicaLostError(Exception):
    """The stream of a generation broke with its replica. `was_alone`: nothing else was on it when it broke."""

    def __init__(self, connection: ReplicaConnection) -> None:
        self.connection = connection
        self.was_alone = connection.num_running_at_break == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a replica is to make. With `has_steps`, its `Step` events are wanted, one for each turn.

    `on_step` is called in any case; without `has_steps` a few times a second.
    """

    request_id: str
    request: ResolvedRequest
    client: str
    left_s: float | None
    traceparent: str | None
    has_steps: bool
    on_step: Callable[[int, int, int], None]
    """Called with the image's index, the UNet calls it has made, and those it makes in all."""


@dataclass(slots=True, eq=False)
class _Running:
    order: Order
    mailbox: Mailbox = field(default_factory=Mailbox)


class ReplicaConnection:
    """One life of a replica, from its first answer to its loss.

    `work` is what it has been given and has not done yet, in UNet rows × latent pixels × calls; that of batch requests is
    `batch_work` instead. `num_running` counts requests of all priorities.
    `lost` is set in the end to why it ended. What becomes known in one life never speaks against the next.
    """

    def __init__(self, address: ReplicaAddress, on_recovery: Callable[[], None] = lambda: None) -> None:
        """`on_recovery` is called when new work may go to it again after a break."""
        self.channel = address.channel()
        self._metadata = address.metadata
        self._stub: ReplicaAsyncStub = ReplicaStub(self.channel)
        self.lost: asyncio.Future[Loss] = asyncio.get_running_loop().create_future()
        self.is_broken = False
        """Its stream broke: it gets no new work until it is clear why."""
        self.work = 0
        self.batch_work = 0
        self.num_running = 0
        self.num_running_at_break: int | None = None
        """How many requests it had when its stream broke; None before."""
        self.is_isolated = False
        """It makes one suspect and takes nothing else."""
        self._numbers = itertools.count(1)
        self._running: dict[int, _Running] = {}
        self._orders: asyncio.Queue[pb.Order] = asyncio.Queue()
        self._following: asyncio.Task[None] | None = None
        self._on_recovery = on_recovery
        self._recovering: asyncio.Task[None] | None = None
        self._is_closed = False

    async def generate(self, order: Order) -> AsyncGenerator[Event, None]:
        """The events of an order, `Done` last. Leaving the iteration early cancels it.

        Raises:
            MiiServeError: what it ended with on the replica.
            DeadlineExceededError: its time ran out, whatever the replica says.
            ReplicaLostError: the replica was lost, or has stopped.
        """
        if self._following is None or self._following.done():
            self._following = asyncio.create_task(self._follow())
        number = next(self._numbers)
        running = self._running[number] = _Running(order)
        self._orders.put_nowait(pb.Order(generate=_encoded(number, order)))
        timer = None
        if order.left_s is not None:
            late = DeadlineExceededError("the pictures were not ready in time")
            timer = asyncio.get_running_loop().call_later(order.left_s, running.mailbox.put, late)
        event: Event | None = None
        try:
            while not isinstance(event, Done):
                event = await running.mailbox.get()
                yield event
        finally:
            if timer is not None:
                timer.cancel()
            if self._running.pop(number, None) is not None:
                self._orders.put_nowait(pb.Order(cancel=pb.Cancel(id=number)))

    async def _follow(self) -> None:
        """Read reports until the stream breaks; then all that runs on it is lost."""
        self._orders = asyncio.Queue()
        for number, running in self._running.items():
            self._orders.put_nowait(pb.Order(generate=_encoded(number, running.order)))
        try:
            call = self._stub.Work(_each(self._orders), metadata=self._metadata)
            try:
                async for report in call:
                    self._deliver(report)
            finally:
                call.cancel()
        except (grpc.aio.AioRpcError, grpc.aio.UsageError):  # the latter: its channel is closed
            pass
        except Exception:
            logger.exception("a replica's report could not be read")
        finally:  # a channel that is closed meanwhile looks as if this task had been cancelled
            self._break()

    def _deliver(self, report: pb.Report) -> None:
        for news in report.before_steps:
            self._deliver_news(news)
        if report.steps.id:
            self._deliver_steps(report.steps)
        for news in report.after_steps:
            self._deliver_news(news)

    def _deliver_steps(self, steps: pb.Steps) -> None:
        columns = zip(steps.id, steps.image_index, steps.step, steps.num_steps, steps.estimated_left_s, strict=True)
        for number, index, step, num_steps, left_s in columns:
            if (running := self._running.get(number)) is not None:
                running.order.on_step(index, step, num_steps)
                if running.order.has_steps:
                    event = Step(image_index=index, step=step, num_steps=num_steps, estimated_left_s=left_s)
                    running.mailbox.put(event)

    def _deliver_news(self, news: pb.News) -> None:
        if (running := self._running.get(news.id)) is None:
            return
        if news.HasField("event"):
            event = decode_event(news.event)
            assert event is not None  # a replica is of its front's version
            if isinstance(event, Done):
                del self._running[news.id]
            running.mailbox.put(event)
            return
        del self._running[news.id]
        error = error_of(status_pb2.Status.FromString(news.error))
        if isinstance(error, EngineLostError | UnavailableError):
            self.note_break()
            running.mailbox.put(ReplicaLostError(self))
        else:
            running.mailbox.put(error)

    def note_break(self) -> None:
        """Its stream broke, so the replica may be lost."""
        self.is_broken = True
        if self.num_running_at_break is None:
            self.num_running_at_break = self.num_running
            if not self._is_closed:
                self._recovering = asyncio.create_task(self._recover())

    async def _recover(self) -> None:
        """Until it is known to be lost, see whether it answers; then it may have work again. No request waits for that."""
        while True:
            await asyncio.wait((self.lost,), timeout=PROBE_EVERY_S)
            if self.lost.done():
                return
            if await self.info(PROBE_TIMEOUT_S) is not None:
                self.is_broken, self.num_running_at_break = False, None
                self._on_recovery()
                return

    def _break(self) -> None:
        self.note_break()
        lost, self._running = self._running, {}
        for running in lost.values():
            running.mailbox.put(ReplicaLostError(self))

    async def info(self, timeout_s: float) -> ServerInfo | None:
        """Its description of itself; None when it does not answer."""
        answer = await _answered(self._stub.GetInfo(pb.GetInfoRequest(), timeout=timeout_s, metadata=self._metadata))
        return None if answer is None else decode_server_info(answer)

    async def hello(self) -> ServerInfo:
        """Its first answer.

        Raises:
            grpc.aio.AioRpcError: nothing answers at the address.
        """
        request = pb.GetInfoRequest()
        answer = await self._stub.GetInfo(request, timeout=HELLO_TIMEOUT_S, wait_for_ready=True, metadata=self._metadata)
        return decode_server_info(answer)

    async def metrics(self, timeout_s: float) -> bytes | None:
        """Its metrics as Prometheus text; None when it does not answer."""
        answer = await _answered(self._stub.GetMetrics(pb.GetMetricsRequest(), timeout=timeout_s, metadata=self._metadata))
        return None if answer is None else answer.text

    async def load_lora(self, name: str, path: Path) -> LoraInfo | None:
        """Let its requests name this LoRA; None when it does not answer.

        Raises:
            MiiServeError: why it cannot.
        """
        request = pb.LoadLoraRequest(name=name, path=str(path))
        answer = await _answered(self._stub.LoadLora(request, timeout=LOAD_TIMEOUT_S, metadata=self._metadata))
        if answer is not None and answer.HasField("error"):
            raise error_of(status_pb2.Status.FromString(answer.error))
        return None if answer is None else decode_lora(answer.lora)

    async def remove_lora(self, name: str) -> None:
        """Let its new requests not name it; nothing happens where it does not answer, or has none of this name."""
        request = pb.RemoveLoraRequest(name=name)
        await _answered(self._stub.RemoveLora(request, timeout=LOAD_TIMEOUT_S, metadata=self._metadata))

    async def close(self) -> None:
        self._is_closed = True
        await self.channel.close()
        tasks = [task for task in (self._following, self._recovering) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._break()


def _encoded(number: int, order: Order) -> pb.Generate:
    image, choice = order.request.input_image, order.request.params.lora_choice
    revisions, scales = zip(*choice.parts, strict=True) if choice.parts else ((), ())
    return pb.Generate(
        id=number,
        request=encode_request(order.request),
        request_id=order.request_id,
        client=order.client,
        timeout_s=order.left_s,
        traceparent=order.traceparent or "",
        has_steps=order.has_steps,
        input_image=None if image is None else pb.InputImage(rgb=image.rgb, mask=image.mask),
        lora_choice=pb.LoraChoice(revisions=revisions, scales=scales, shares_calls=choice.shares_calls),
    )


async def _each(orders: asyncio.Queue[pb.Order]) -> AsyncIterator[pb.Order]:
    while True:
        yield await orders.get()


async def _answered(call: Awaitable[_Answer]) -> _Answer | None:
    """The answer; None where the replica gives none, its channel being closed meanwhile included."""
    try:
        return await call
    except (grpc.aio.AioRpcError, grpc.aio.UsageError):
        return None
    except asyncio.CancelledError:  # a closed channel looks as if the caller had cancelled
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        return None


Prepare = Callable[[ReplicaConnection, ServerInfo], Awaitable[ServerInfo]]
"""Brings a replica up to date and gives its description afterwards."""


class ReplicaClient:
    """One replica of the deployment over all of its lives."""

    def __init__(self, index: int, on_recovery: Callable[[], None] = lambda: None) -> None:
        """`on_recovery` is called when it takes work again after its connection broke."""
        self.index = index
        self._on_recovery = on_recovery
        self.num_restarts = 0
        self.is_retiring = False
        """It finishes what it has and gets no new work."""
        self._connection: ReplicaConnection | None = None

    @property
    def connection(self) -> ReplicaConnection | None:
        """Where new work may go; None from the first sign of its loss on, and while it is retiring."""
        return None if self._connection is None or self._connection.is_broken or self.is_retiring else self._connection

    @property
    def is_broken(self) -> bool:
        """Its connection broke, and it is not known yet why."""
        return self._connection is not None and self._connection.is_broken

    @property
    def is_up(self) -> bool:
        return self.connection is not None

    @property
    def work(self) -> int:
        return 0 if self._connection is None else self._connection.work

    @property
    def num_running(self) -> int:
        return 0 if self._connection is None else self._connection.num_running

    async def attach(self, address: ReplicaAddress, prepare: Prepare | None = None) -> ServerInfo:
        """Use the replica at this address from now on, once `prepare` is done with it; returns its description of itself.

        Raises:
            grpc.aio.AioRpcError: nothing answers there.
        """
        await self.detach(Loss(reason="it was replaced", is_crash=False))
        connection = ReplicaConnection(address, self._on_recovery)
        try:
            info = await connection.hello()
            if prepare is not None:
                info = await prepare(connection, info)
        except BaseException:
            await connection.close()
            raise
        self._connection = connection
        return info

    async def detach(self, loss: Loss) -> None:
        """It is gone: resolve `lost` with the reason."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.lost.set_result(loss)
            await connection.close()

    async def metrics(self, timeout_s: float) -> bytes | None:
        """Its metrics as Prometheus text; None when it is not there."""
        return None if (connection := self.connection) is None else await connection.metrics(timeout_s)

    async def info(self, timeout_s: float) -> ServerInfo | None:
        """Its description of itself; None when it is not there."""
        return None if (connection := self.connection) is None else await connection.info(timeout_s)

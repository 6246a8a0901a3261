"""What the front knows of one replica: whether it can be asked, how much work it has, and why it was lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from mii_serve.proto.codec import CHANNEL_OPTIONS, GET_METRICS, decode_capabilities
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationStub
from mii_serve.types import Capabilities

if TYPE_CHECKING:
    from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationAsyncStub

_Answer = TypeVar("_Answer")

HELLO_TIMEOUT_S = 30.0
PROBE_TIMEOUT_S = 5.0
REPLICA_CHANNEL_OPTIONS = (*CHANNEL_OPTIONS, ("grpc.client_idle_timeout_ms", 2**31 - 1))
"""A connection is kept as long as its replica lives: for another one, the socket's file may have been cleaned away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """How a replica ended. A crash speaks against what was running on it; a kill from outside does not."""

    reason: str
    is_crash: bool


class Connection:
    """One life of a replica, as long as it can be asked.

    `work` is what it has been given and has not done yet, in UNet rows × latent cells × calls; `num_running` counts the calls.
    `lost` says in the end why it ended. What is learnt of one life never speaks against the next.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.stub: ImageGenerationAsyncStub = ImageGenerationStub(channel)
        self.lost: asyncio.Future[Loss] = asyncio.get_running_loop().create_future()
        self.is_broken = False
        """A call to it broke: it gets no new work until it is clear why."""
        self.work = 0
        self.num_running = 0
        self.num_running_at_break: int | None = None
        """How many calls it had when the first of them broke; None before."""
        self.is_isolated = False
        """It makes one suspect and takes nothing else."""

    def note_break(self) -> None:
        """A call to it broke, so its replica may be lost."""
        self.is_broken = True
        if self.num_running_at_break is None:
            self.num_running_at_break = self.num_running

    async def answers(self) -> bool:
        """Whether the replica is there after all."""
        return await self.info(PROBE_TIMEOUT_S) is not None

    async def info(self, timeout_s: float) -> pb.GetServerInfoResponse | None:
        """What the replica says of itself; None when it does not answer."""
        return await _answered(self.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=timeout_s))

    async def metrics(self, timeout_s: float) -> bytes | None:
        """Its metrics as Prometheus text; None when it does not answer."""
        ask: Any = self.channel.unary_unary(GET_METRICS)
        return await _answered(ask(b"", timeout=timeout_s))


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


class ReplicaLink:
    """The place of one replica, through all its lives."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.num_restarts = 0
        self._connection: Connection | None = None

    @property
    def connection(self) -> Connection | None:
        """Where new work may go; None from the first sign of its loss on."""
        return None if self._connection is None or self._connection.is_broken else self._connection

    @property
    def is_up(self) -> bool:
        return self.connection is not None

    @property
    def work(self) -> int:
        return 0 if self._connection is None else self._connection.work

    @property
    def num_running(self) -> int:
        return 0 if self._connection is None else self._connection.num_running

    async def attach(self, socket: Path) -> tuple[pb.GetServerInfoResponse, Capabilities]:
        """Talk to the replica behind this socket from now on; what it says of itself.

        Raises:
            grpc.aio.AioRpcError: nobody answers there.
        """
        await self.detach(Loss(reason="it was replaced", is_crash=False))
        connection = Connection(grpc.aio.insecure_channel(f"unix:{socket}", options=REPLICA_CHANNEL_OPTIONS))
        try:
            info: pb.GetServerInfoResponse = await connection.stub.GetServerInfo(
                pb.GetServerInfoRequest(), timeout=HELLO_TIMEOUT_S, wait_for_ready=True
            )
        except BaseException:
            await connection.channel.close()
            raise
        capabilities = decode_capabilities(info)
        self._connection = connection
        return info, capabilities

    async def detach(self, loss: Loss) -> None:
        """It is gone; whoever waits to know why, knows."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.lost.set_result(loss)
            await connection.channel.close()

    async def metrics(self, timeout_s: float) -> bytes | None:
        """Its metrics as Prometheus text; None when it is not there."""
        return None if (connection := self.connection) is None else await connection.metrics(timeout_s)

    async def info(self, timeout_s: float) -> pb.GetServerInfoResponse | None:
        """What it says of itself; None when it is not there."""
        return None if (connection := self.connection) is None else await connection.info(timeout_s)

"""What the front knows of one replica: whether it can be asked, how much work it has, and why it was lost."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from mii_serve.proto.codec import CHANNEL_OPTIONS, GET_METRICS, decode_capabilities
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationStub
from mii_serve.types import Capabilities

if TYPE_CHECKING:
    from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationAsyncStub

HELLO_TIMEOUT_S = 30.0
PROBE_TIMEOUT_S = 5.0


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
        self.is_suspect = False
        """A call to it broke: it gets no new work until it is clear why."""
        self.work = 0
        self.num_running = 0

    async def answers(self) -> bool:
        """Whether the replica is there after all."""
        try:
            await self.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=PROBE_TIMEOUT_S)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError):  # the latter: its channel has been closed
            return False
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return False  # its channel was closed meanwhile, which looks as if somebody had cancelled us
        return True


class ReplicaLink:
    """The place of one replica, through all its lives."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.num_restarts = 0
        self._connection: Connection | None = None

    @property
    def connection(self) -> Connection | None:
        """Where new work may go; None from the first sign of its loss on."""
        return None if self._connection is None or self._connection.is_suspect else self._connection

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
        connection = Connection(grpc.aio.insecure_channel(f"unix:{socket}", options=CHANNEL_OPTIONS))
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
        if (connection := self.connection) is None:
            return None
        with contextlib.suppress(grpc.aio.AioRpcError):
            ask: Any = connection.channel.unary_unary(GET_METRICS)
            text: bytes = await ask(b"", timeout=timeout_s)
            return text
        return None

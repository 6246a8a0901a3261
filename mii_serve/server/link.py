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


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """How a replica ended. A crash speaks against what was running on it; a kill from outside does not."""

    reason: str
    is_crash: bool


class ReplicaLink:
    """`work` is what it has been given and has not done yet, in UNet rows × latent cells × calls."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.work = 0
        self.num_running = 0
        self.num_restarts = 0
        self._channel: grpc.aio.Channel | None = None
        self._is_suspect = False
        self._lost: asyncio.Future[Loss] | None = None

    @property
    def is_up(self) -> bool:
        """Whether new work may go there. False from the first sign of its loss on."""
        return self._channel is not None and not self._is_suspect

    async def attach(self, socket: Path) -> tuple[pb.GetServerInfoResponse, Capabilities]:
        """Talk to the replica behind this socket from now on; what it says of itself.

        Raises:
            grpc.aio.AioRpcError: nobody answers there.
        """
        await self.detach(Loss(reason="it was replaced", is_crash=False))
        channel = grpc.aio.insecure_channel(f"unix:{socket}", options=CHANNEL_OPTIONS)
        info: pb.GetServerInfoResponse = await ImageGenerationStub(channel).GetServerInfo(
            pb.GetServerInfoRequest(), timeout=HELLO_TIMEOUT_S, wait_for_ready=True
        )
        capabilities = decode_capabilities(info)
        self.work, self.num_running = 0, 0
        self._channel, self._is_suspect = channel, False
        self._lost = asyncio.get_running_loop().create_future()
        return info, capabilities

    async def detach(self, loss: Loss) -> None:
        """It is gone; whoever waits to know why, knows."""
        channel, self._channel = self._channel, None
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(loss)
        if channel is not None:
            await channel.close()

    def stub(self) -> ImageGenerationAsyncStub:
        assert self._channel is not None
        return ImageGenerationStub(self._channel)

    async def metrics(self, timeout_s: float) -> bytes | None:
        """Its metrics as Prometheus text; None when it is not there."""
        if self._channel is None or self._is_suspect:
            return None
        with contextlib.suppress(grpc.aio.AioRpcError):
            ask: Any = self._channel.unary_unary(GET_METRICS)
            text: bytes = await ask(b"", timeout=timeout_s)
            return text
        return None

    def suspect(self) -> asyncio.Future[Loss] | None:
        """A call to it broke: it gets no new work until it is attached again. The future says why it was lost."""
        self._is_suspect = True
        return self._lost

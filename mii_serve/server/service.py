"""The public v1 service: checks a request at the door, passes it to the replica, and passes back what the replica says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from mii_serve.errors import InvalidRequestError, UnavailableError
from mii_serve.proto.codec import (
    CHANNEL_OPTIONS,
    decode_capabilities,
    decode_request,
    encode_request,
    gather_response,
)
from mii_serve.proto.interceptor import CLIENT_ID_KEY, REQUEST_ID_KEY, Context, current_request_id
from mii_serve.proto.status import decode_error
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationServicer, ImageGenerationStub
from mii_serve.types import Capabilities, draw_seed

if TYPE_CHECKING:
    from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationAsyncStub


class FrontService(ImageGenerationServicer):
    """Refuses everything until `attach`, and again after `detach` or `drain`."""

    def __init__(self) -> None:
        self._channel: grpc.aio.Channel | None = None
        self._capabilities: Capabilities | None = None
        self._is_draining = False
        self._num_active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_ready(self) -> bool:
        """Whether a request that arrives now would be worked on."""
        return self._channel is not None and not self._is_draining

    async def attach(self, socket: Path) -> pb.GetServerInfoResponse:
        """Talk to the replica behind this socket from now on; answer what it says of itself."""
        await self.detach()
        channel = grpc.aio.insecure_channel(f"unix:{socket}", options=CHANNEL_OPTIONS)
        info: pb.GetServerInfoResponse = await ImageGenerationStub(channel).GetServerInfo(
            pb.GetServerInfoRequest(), timeout=30.0, wait_for_ready=True
        )
        self._channel, self._capabilities = channel, decode_capabilities(info)
        return info

    async def detach(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the running ones; False when some were left at the end."""
        self._is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return self._num_active == 0

    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> AsyncGenerator[pb.GenerateEvent, None]:  # noqa: N802
        stub, capabilities = self._replica()
        params, output, priority = decode_request(request, capabilities, fallback_seed=draw_seed())
        with self._counted(), _replica_errors():
            call = stub.GenerateStream(
                encode_request(params, output, priority),
                timeout=context.time_remaining(),
                metadata=((REQUEST_ID_KEY, current_request_id.get()), (CLIENT_ID_KEY, _client_id(context))),
            )
            try:
                async for event in call:
                    yield event
            finally:
                call.cancel()  # the caller may have gone away in the middle

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:  # noqa: N802
        if request.output.HasField("preview_every"):
            raise InvalidRequestError("output.preview_every", "needs GenerateStream, which can show previews")
        async with contextlib.aclosing(self.GenerateStream(request, context)) as events:
            return gather_response([event async for event in events])

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:  # noqa: N802
        stub, _ = self._replica(for_new_work=False)
        with _replica_errors():
            info: pb.GetServerInfoResponse = await stub.GetServerInfo(request, timeout=context.time_remaining())
            return info

    def _replica(self, *, for_new_work: bool = True) -> tuple[ImageGenerationAsyncStub, Capabilities]:
        if self._is_draining and for_new_work:
            raise UnavailableError("the server is draining")
        if self._channel is None or self._capabilities is None:
            raise UnavailableError("the server is not ready: no replica has made its warm-up picture yet")
        return ImageGenerationStub(self._channel), self._capabilities

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._num_active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_active -= 1
            if self._num_active == 0:
                self._idle.set()


def _client_id(context: Context) -> str:
    """Whom the caller names, a gateway for example; else the connection."""
    named = str(dict(context.invocation_metadata() or ()).get(CLIENT_ID_KEY) or "")
    return f"named {named}" if named else f"peer {context.peer()}"


@contextlib.contextmanager
def _replica_errors() -> Iterator[None]:
    """What the replica refused is refused in the same words; a lost replica is UNAVAILABLE."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE and not error.trailing_metadata():
            raise UnavailableError("the replica was lost while it worked on this; it is being restarted") from error
        raise decode_error(error.code(), error.details() or "", error.trailing_metadata()) from error

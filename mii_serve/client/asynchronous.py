"""The client for asyncio."""

# ruff: noqa: ASYNC109 - a timeout here is a deadline that is sent to the server, which asyncio.timeout cannot do.

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc

from mii_serve.client.arguments import check_bound, check_timeout
from mii_serve.client.calls import (
    GenerationCalls,
    Pairs,
    StreamCall,
    cancelled_here,
    channel_options,
    closed_client,
    result_of,
    typed_error,
    with_timeout,
)
from mii_serve.client.health import HEALTH_OF_ALL, RETRY_PAUSE_S, Readiness, health_name
from mii_serve.client.results import Event, GenerationResult
from mii_serve.client.retries import MAX_RETRIES, Attempts
from mii_serve.errors import MiiServeError
from mii_serve.proto.codec import decode_server_info
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationStub
from mii_serve.types import ServerInfo


class AsyncGenerationStream(StreamCall):
    """The events of one request. Leaving its `async with` block early cancels the request, as cancelling its reader does."""

    def __aiter__(self) -> AsyncGenerationStream:
        return self

    async def __anext__(self) -> Event:
        while True:
            try:
                message = await self._call.read()
            except grpc.RpcError as error:
                raise self._error(error) from error
            except asyncio.CancelledError as error:
                if _is_task_cancelled():
                    raise
                raise cancelled_here() from error
            if message is grpc.aio.EOF:
                self._builder.result()  # a stream that ends early is an error, not a short stream
                raise StopAsyncIteration
            try:
                # Decoding an image takes milliseconds that the other tasks need.
                has_image = message.WhichOneof("event") in ("image", "preview")
                event = await asyncio.to_thread(self._event, message) if has_image else self._event(message)
            except (MiiServeError, asyncio.CancelledError):
                self.cancel()
                raise
            if event is not None:
                return event

    async def result(self) -> GenerationResult:
        """Read the rest of the events and return what `generate` would have."""
        async for _ in self:
            pass
        return self._builder.result()

    async def __aenter__(self) -> AsyncGenerationStream:
        return self

    async def __aexit__(self, *raised: object) -> None:
        self.cancel()


class AsyncClient(GenerationCalls[Coroutine[Any, Any, GenerationResult], AsyncGenerationStream]):
    """A connection to one server, opened by the first call and belonging to the event loop that made it.

    Cancelling a task that waits for `generate` cancels the request on the server. Make the client after a fork, not before.
    Without `credentials` the connection is plain text; `grpc.ssl_channel_credentials` makes some.
    """

    def __init__(
        self,
        target: str,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        max_retries: int = MAX_RETRIES,
    ) -> None:
        super().__init__(target, api_key, max_retries)
        self._credentials = credentials
        self._channel: grpc.aio.Channel | None = None
        self._closed = False

    def _open_channel(self) -> grpc.aio.Channel:
        """The channel; made late, because it belongs to the running event loop."""
        if self._closed:
            raise closed_client(self)
        if self._channel is None:
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.target, channel_options(self.target))
            else:
                self._channel = grpc.aio.secure_channel(self.target, self._credentials, channel_options(self.target))
        return self._channel

    def _stub(self) -> Any:
        return ImageGenerationStub(self._open_channel())

    def _health_stub(self) -> Any:
        return health_pb2_grpc.HealthStub(self._open_channel())

    async def _answer(self, call: Any) -> Any:
        try:
            return await call
        except grpc.RpcError as error:
            raise typed_error(error, self.target) from error
        except asyncio.CancelledError as error:
            if _is_task_cancelled():
                raise
            raise cancelled_here() from error  # the client was closed under the call

    async def _generate(self, request: pb.GenerateRequest, timeout: float | None, metadata: Pairs) -> GenerationResult:
        attempts = Attempts(self._max_retries, timeout)
        while True:
            try:
                left_s = attempts.left_s
                call = self._stub().Generate(request, timeout=left_s, metadata=with_timeout(metadata, left_s))
                message = await self._answer(call)
                return await asyncio.to_thread(result_of, message)
            except MiiServeError as error:
                await asyncio.sleep(attempts.pause_s(error))

    def _stream(self, request: pb.GenerateRequest, timeout: float | None, metadata: Pairs) -> AsyncGenerationStream:
        call = self._stub().GenerateStream(request, timeout=timeout, metadata=with_timeout(metadata, timeout))
        return AsyncGenerationStream(call, self.target)

    async def server_info(self, *, timeout: float | None = 10.0) -> ServerInfo:
        """What runs there, what it accepts and how busy it is."""
        request, bound = pb.GetServerInfoRequest(), check_timeout(timeout)
        call = self._stub().GetServerInfo(request, timeout=bound, metadata=self._metadata)
        return decode_server_info(await self._answer(call))

    async def health(self, *, timeout: float | None = 10.0) -> str:
        """The server's health by gRPC's name for it: SERVING when it takes requests."""
        return health_name(await self._answer(self._health_stub().Check(HEALTH_OF_ALL, timeout=check_timeout(timeout))))

    async def wait_ready(self, timeout: float = 60.0) -> None:
        """Return as soon as the server takes requests.

        Raises:
            UnavailableError: it does not within `timeout` seconds.
        """
        deadline = time.monotonic() + check_bound(timeout)
        readiness = Readiness(self.target, timeout)
        while (left := deadline - time.monotonic()) > 0:
            watch = self._health_stub().Watch(HEALTH_OF_ALL, timeout=left, wait_for_ready=True)
            try:
                while (answer := await watch.read()) is not grpc.aio.EOF:
                    if readiness.is_ready(answer):
                        return
            except grpc.RpcError as error:
                readiness.note_failure(error)
            finally:
                watch.cancel()
            await asyncio.sleep(min(RETRY_PAUSE_S, max(0.0, deadline - time.monotonic())))
        raise readiness.timeout_error()

    async def close(self) -> None:
        """Close the connection; what is in flight is cancelled."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.close()


def _is_task_cancelled() -> bool:
    """gRPC reports a cancelled call as `CancelledError` too; only a task that was asked to stop must see that."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0

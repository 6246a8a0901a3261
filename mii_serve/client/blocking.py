"""The client for threads."""

from __future__ import annotations

import time
from typing import Any

import grpc
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


class GenerationStream(StreamCall):
    """The events of one request. Leaving its `with` block early cancels the request.

    One thread reads; any thread may cancel.
    """

    def __iter__(self) -> GenerationStream:
        return self

    def __next__(self) -> Event:
        while True:
            try:
                message = next(self._call)
            except StopIteration:
                self._builder.result()  # a stream that ends early is an error, not a short stream
                raise
            except grpc.RpcError as error:
                raise self._error(error) from error
            try:
                event = self._event(message)
            except MiiServeError:
                self.cancel()
                raise
            if event is not None:
                return event

    def result(self) -> GenerationResult:
        """Read the rest of the events and return what `generate` would have."""
        for _ in self:
            pass
        return self._builder.result()

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(self, *raised: object) -> None:
        self.cancel()


class Client(GenerationCalls[GenerationResult, GenerationStream]):
    """A connection to one server, opened by the first call and shared by any number of threads.

    Make it after a fork, not before: a child cannot use its parent's channel, so with `multiprocessing` prefer "spawn".
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
        if credentials is None:
            self._channel = grpc.insecure_channel(target, channel_options(target))
        else:
            self._channel = grpc.secure_channel(target, credentials, channel_options(target))
        self._stub: Any = ImageGenerationStub(self._channel)
        self._health_stub: Any = health_pb2_grpc.HealthStub(self._channel)
        self._closed = False

    def _generate(self, request: pb.GenerateRequest, timeout: float | None, metadata: Pairs) -> GenerationResult:
        attempts = Attempts(self._max_retries, timeout)
        while True:
            try:
                return self._generate_once(request, attempts.left_s, metadata)
            except MiiServeError as error:
                time.sleep(attempts.pause_s(error))

    def _generate_once(self, request: pb.GenerateRequest, timeout: float | None, metadata: Pairs) -> GenerationResult:
        self._check_open()
        call = self._stub.Generate.future(request, timeout=timeout, metadata=with_timeout(metadata, timeout))
        try:
            message = call.result()
        except grpc.FutureCancelledError as error:
            raise cancelled_here() from error
        except grpc.RpcError as error:
            raise typed_error(error, self.target) from error
        finally:
            call.cancel()  # without an answer this was an interrupt: the server is to stop
        return result_of(message)

    def _stream(self, request: pb.GenerateRequest, timeout: float | None, metadata: Pairs) -> GenerationStream:
        self._check_open()
        call = self._stub.GenerateStream(request, timeout=timeout, metadata=with_timeout(metadata, timeout))
        return GenerationStream(call, self.target)

    def server_info(self, *, timeout: float | None = 10.0) -> ServerInfo:
        """What runs there, what it accepts and how busy it is."""
        self._check_open()
        try:
            request, bound = pb.GetServerInfoRequest(), check_timeout(timeout)
            message = self._stub.GetServerInfo(request, timeout=bound, metadata=self._metadata)
        except grpc.RpcError as error:
            raise typed_error(error, self.target) from error
        return decode_server_info(message)

    def health(self, *, timeout: float | None = 10.0) -> str:
        """The server's health by gRPC's name for it: SERVING when it takes requests."""
        self._check_open()
        try:
            answer = self._health_stub.Check(HEALTH_OF_ALL, timeout=check_timeout(timeout))
        except grpc.RpcError as error:
            raise typed_error(error, self.target) from error
        return health_name(answer)

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Return as soon as the server takes requests.

        Raises:
            UnavailableError: it does not within `timeout` seconds.
        """
        self._check_open()
        deadline = time.monotonic() + check_bound(timeout)
        readiness = Readiness(self.target, timeout)
        while (left := deadline - time.monotonic()) > 0:
            watch = self._health_stub.Watch(HEALTH_OF_ALL, timeout=left, wait_for_ready=True)
            try:
                if any(readiness.is_ready(answer) for answer in watch):
                    return
            except grpc.RpcError as error:
                readiness.note_failure(error)
            finally:
                watch.cancel()
            time.sleep(min(RETRY_PAUSE_S, max(0.0, deadline - time.monotonic())))
        raise readiness.timeout_error()

    def _check_open(self) -> None:
        if self._closed:
            raise closed_client(self)

    def close(self) -> None:
        """Close the connection; what is in flight is cancelled."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

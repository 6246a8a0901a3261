"""gRPC calls that come through Ray's proxy, answered like those on the front's own port: by the same services, behind the same
interceptor.

Ray hands over a method's name, the message's bytes and a context of its own, and takes back messages with a copy of that
context. It carries no initial metadata and no deadline, so the deadline is read from metadata (`TIMEOUT_KEY`). It keeps the
trailing metadata, which hold an error's field, only of calls that raise nothing: an error is a code in the context of a last,
empty message, which gRPC does not send.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import grpc
from grpc_health.v1 import health

from mii_serve.errors import InvalidRequestError, MiiServeError, PermissionDeniedError
from mii_serve.proto.codec import MAX_REQUEST_BYTES
from mii_serve.proto.metadata import TIMEOUT_KEY, check_timeout_s
from mii_serve.proto.status import encode_error
from mii_serve.server.bounded_write import address_of
from mii_serve.server.call import Admission
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.front import add_services, is_loopback
from mii_serve.server.interceptor import CallInterceptor
from mii_serve.server.keys import KeyRing
from mii_serve.server.mii import MII_SERVICES, NOT_SERVED
from mii_serve.server.service import SERVICE_NAME

METHODS: Mapping[str, Mapping[str, bool]] = {
    SERVICE_NAME: {"Generate": False, "GenerateStream": True, "GetServerInfo": False},
    health.SERVICE_NAME: {"Check": False, "Watch": True},
    **{service: dict.fromkeys(("Txt2ImgReply", "Terminate", *NOT_SERVED), False) for service in MII_SERVICES},
}
"""Each service's methods, and whether a method answers with a stream. Ray tells methods apart by their names alone."""
PATHS = {name: f"/{service}/{name}" for service, methods in reversed([*METHODS.items()]) for name in methods}
IS_STREAM = {name: is_stream for methods in METHODS.values() for name, is_stream in methods.items()}

FROM_ELSEWHERE = "the setting host lets this machine's callers in, and you call from another one"


def add_to_server(servicer: Any, server: grpc.aio.Server) -> None:
    """Register all methods with Ray's proxy, as bytes: the front reads and refuses messages itself.

    Ray imports this by its path (`grpc_servicer_functions`) and puts itself in the place of each method.
    """
    for service, methods in METHODS.items():
        handlers: dict[str, Any] = {
            name: grpc.unary_stream_rpc_method_handler(getattr(servicer, name))
            if is_stream
            else grpc.unary_unary_rpc_method_handler(getattr(servicer, name))
            for name, is_stream in methods.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))


class RayContext(Protocol):
    """What is used of `RayServegRPCContext`."""

    def peer(self) -> str: ...
    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]: ...
    def set_code(self, code: grpc.StatusCode) -> None: ...
    def set_details(self, details: str) -> None: ...
    def set_trailing_metadata(self, metadata: list[tuple[str, str | bytes]]) -> None: ...


class Message(NamedTuple):
    """A message that is serialized already, as Ray serializes one."""

    encoded: bytes

    def SerializeToString(self) -> bytes:  # noqa: N802 - the name is protobuf's
        return self.encoded


class ProxiedCalls:
    """Answers the calls of Ray's proxy. `host` is the setting: of a loopback address, only callers on a proxy's own machine are
    answered, whatever the proxy listens on.
    """

    def __init__(self, dispatcher: Dispatcher, keys: KeyRing, health_service: health.aio.HealthServicer, host: str) -> None:
        self._services = _Services()
        add_services(cast("grpc.aio.Server", self._services), dispatcher, health_service)
        self._interceptor = CallInterceptor(Admission(dispatcher.metrics, keys))
        self._is_local_only = is_loopback(host)

    async def one(self, name: str, wire: bytes, ray_context: RayContext) -> Message:
        """The only message of a call, an empty one if the context says how it failed."""
        last = Message(b"")
        async for message in self.stream(name, wire, ray_context):
            last = message
        return last

    async def stream(self, name: str, wire: bytes, ray_context: RayContext) -> AsyncGenerator[Message, None]:
        """The messages of a call. Leaving the iteration early cancels it."""
        context = _Context(ray_context)
        answering = asyncio.create_task(self._answer(PATHS[name], wire, context))
        try:
            while (message := await _next(context.messages, answering)) is not None:
                yield message
            if not answering.cancelled() and (error := answering.exception()) is not None:
                if not isinstance(error, grpc.aio.AbortError):
                    raise error
                yield Message(b"")
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    async def _answer(self, path: str, wire: bytes, context: _Context) -> None:
        try:
            self._check(wire, context)
        except MiiServeError as error:
            await context.abort(*encode_error(error))
        details: Any = _Details(path, context.invocation_metadata())
        handler: Any = await self._interceptor.intercept_service(self._services.find, details)
        context.serialize = handler.response_serializer or bytes
        request = wire if handler.request_deserializer is None else handler.request_deserializer(wire)
        if handler.response_streaming:
            await handler.unary_stream(request, context)
        else:
            await context.write(await handler.unary_unary(request, context))

    def _check(self, wire: bytes, context: _Context) -> None:
        if self._is_local_only and not is_loopback(address_of(context.peer())):
            raise PermissionDeniedError(FROM_ELSEWHERE)
        if len(wire) > MAX_REQUEST_BYTES:
            raise InvalidRequestError("request", f"must be at most {MAX_REQUEST_BYTES} bytes")
        context.read_timeout()


class _Details(NamedTuple):
    """As `grpc.HandlerCallDetails`."""

    method: str
    invocation_metadata: Sequence[tuple[str, str | bytes]]


class _Services:
    """As much of a server as services need to register with, and a call to find its method."""

    def __init__(self) -> None:
        self._handlers: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """They are among the generic ones, too."""

    async def find(self, details: Any) -> Any:
        found = (handler.service(details) for handler in self._handlers)
        return next(handler for handler in found if handler is not None)


class _Context:
    """The context of one call for services that are written for gRPC's own."""

    def __init__(self, ray_context: RayContext) -> None:
        self._ray = ray_context
        self._timeout_s: float | None = None
        self.messages: asyncio.Queue[Message] = asyncio.Queue(1)
        self.serialize: Callable[[Any], bytes] = bytes

    def peer(self) -> str:
        return self._ray.peer()

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        return self._ray.invocation_metadata()

    def read_timeout(self) -> None:
        """Raises:
        InvalidRequestError: what the metadata have is none.
        """
        given = dict(self.invocation_metadata()).get(TIMEOUT_KEY)
        self._timeout_s = None if given is None else check_timeout_s(str(given))

    def time_remaining(self) -> float | None:
        return self._timeout_s

    async def send_initial_metadata(self, metadata: object) -> None:
        """Ray has no way to send them; the request id is in our messages, too."""

    def set_trailing_metadata(self, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        self._ray.set_trailing_metadata(list(metadata))

    async def write(self, message: Any) -> None:
        await self.messages.put(Message(self.serialize(message)))

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Iterable[tuple[str, str | bytes]] = ()
    ) -> None:
        self._ray.set_code(code)
        self._ray.set_details(details)
        self.set_trailing_metadata(trailing_metadata)
        raise grpc.aio.AbortError(details)


async def _next(messages: asyncio.Queue[Message], answering: asyncio.Task[None]) -> Message | None:
    """The next message; None once the call has ended and there is no other."""
    if messages.empty() and not answering.done():
        getting = asyncio.ensure_future(messages.get())
        try:
            await asyncio.wait((getting, answering), return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                return getting.result()
        finally:
            getting.cancel()
    return None if messages.empty() else messages.get_nowait()


def method_of(name: str) -> Callable[..., Any]:
    """What a deployment has as its method of this name. Its attribute `calls` is a `ProxiedCalls`."""

    async def stream(self: Any, wire: bytes, grpc_context: RayContext) -> AsyncGenerator[Message, None]:
        async for message in self.calls.stream(name, wire, grpc_context):
            yield message

    async def one(self: Any, wire: bytes, grpc_context: RayContext) -> Message:
        answer: Message = await self.calls.one(name, wire, grpc_context)
        return answer

    method = stream if IS_STREAM[name] else one
    method.__name__ = name
    return method

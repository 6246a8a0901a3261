"""Server side of every gRPC call: a request id for each, the gate, and the one place where errors become statuses."""

from __future__ import annotations

import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

import grpc
from google.protobuf.message import DecodeError

from mii_serve.errors import InvalidRequestError, MiiServeError, RequestCancelledError
from mii_serve.proto.status import encode_error

logger = logging.getLogger(__name__)

REQUEST_ID_KEY = "x-request-id"
CLIENT_ID_KEY = "x-client-id"
"""On whose behalf a call is made. Callers share a busy server fairly; without it, each connection is a caller."""
IDEMPOTENCY_KEY = "x-idempotency-key"
"""A caller's own name for a piece of work: the same name is worked on once and answered alike."""
MII_PACKAGES = ("legacymodelresponse", "modelresponse")
"""DeepSpeed-MII's, since 0.1.1 and before."""
_OWN = ("/mii_serve.", *(f"/{package}.ModelResponse/" for package in MII_PACKAGES))
_WORK = frozenset({"Generate", "GenerateStream", "Txt2ImgReply"})
_REQUEST_ID = re.compile(r"[!-~]{1,100}( [0-9]+)?")
"""The number is not for callers: the front writes it where it parts a request between replicas."""


def is_work(method: str) -> bool:
    """Whether calls of this method make pictures: they count against a key's limits and get a line in the log.

    HTTP calls have the name "VERB /route".
    """
    return method.rpartition("/")[2] in _WORK or method.startswith("POST ")


def check_idempotency_key(key: str) -> str:
    """The key, if it is one.

    Raises:
        InvalidRequestError: it breaks the rule.
    """
    if not isinstance(key, str) or not re.fullmatch(r"[!-~]{1,100}", key):
        raise InvalidRequestError(IDEMPOTENCY_KEY, "must be 1 to 100 printable ASCII characters without spaces")
    return key


current_request_id: ContextVar[str] = ContextVar("current_request_id", default="-")
current_key_name: ContextVar[str | None] = ContextVar("current_key_name", default=None)
"""Which API key the call came with; None where the server wants none."""

current_facts: ContextVar[MutableMapping[str, object]] = ContextVar("current_facts")
"""What is learnt of the call on its way, for whoever watches."""

Gate = Callable[[str, Mapping[str, str]], AbstractContextManager[str | None]]
"""Given a call's method and metadata, lets it in while the block runs, and names its API key; or raises a `MiiServeError`."""


class Watcher(Protocol):
    """Is told of every call as it begins and as it ends."""

    def new_facts(self, method: str, metadata: Mapping[str, str]) -> MutableMapping[str, object]: ...
    def close(self, method: str, request_id: str, code: str, seconds: float, facts: Mapping[str, object]) -> None: ...


class _Nobody:
    def new_facts(self, method: str, metadata: Mapping[str, str]) -> MutableMapping[str, object]:
        return {}

    def close(self, method: str, request_id: str, code: str, seconds: float, facts: Mapping[str, object]) -> None:
        pass


def open_gate(method: str, metadata: Mapping[str, str]) -> AbstractContextManager[str | None]:
    return contextlib.nullcontext()


if TYPE_CHECKING:  # grpc's classes are generic in their type stubs only
    Handler = grpc.RpcMethodHandler[Any, Any] | None
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Handler, Context = grpc.RpcMethodHandler, grpc.aio.ServicerContext


Entrance = Callable[[Context], AbstractAsyncContextManager[None]]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of our own services and of MII's; health and reflection answer for themselves.

    A `MiiServeError` ends the call with its own code and details. Anything else is a defect: INTERNAL with the request id for
    the caller, the traceback for the log.
    """

    def __init__(self, gate: Gate = open_gate, watcher: Watcher | None = None) -> None:
        self._gate = gate
        self._watcher = watcher or _Nobody()

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Handler:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(_OWN):
            return handler
        metadata = {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}

        def entered(context: Context) -> AbstractAsyncContextManager[None]:
            gate = self._gate(details.method, metadata)
            return _entered(context, details.method, metadata, gate, self._watcher)

        parse = _checked_parser(handler.request_deserializer)
        if handler.response_streaming:
            call = _wrap_stream(handler.unary_stream, parse, entered)
            return grpc.unary_stream_rpc_method_handler(call, None, handler.response_serializer)
        call = _wrap_unary(handler.unary_unary, parse, entered)
        return grpc.unary_unary_rpc_method_handler(call, None, handler.response_serializer)


def _checked_parser(parse: Any) -> Callable[[bytes], Any]:
    """Left to grpc itself, bytes that are no message would end as UNKNOWN with a traceback in the log."""

    def checked(wire: bytes) -> Any:
        try:
            return parse(wire)
        except DecodeError:
            raise InvalidRequestError("request", "must be a well-formed message with valid UTF-8 text") from None

    return checked


def _wrap_unary(method: Any, parse: Callable[[bytes], Any], entered: Entrance) -> Any:
    async def call(wire: bytes, context: Context) -> Any:
        async with entered(context):
            return await method(parse(wire), context)

    return call


def _wrap_stream(method: Any, parse: Callable[[bytes], Any], entered: Entrance) -> Any:
    # Not a generator: a call cancelled in the middle of a write closes the messages here, and not when the collector comes.
    async def call(wire: bytes, context: Context) -> None:
        async with entered(context), contextlib.aclosing(method(parse(wire), context)) as messages:
            async for message in messages:
                await _write(context, message)

    return call


async def _write(context: Context, message: Any) -> None:
    try:
        await context.write(message)
    except grpc.aio.BaseError:  # only a call that is over cannot be written to
        raise RequestCancelledError("the caller has gone away") from None


@contextlib.asynccontextmanager
async def _entered(
    context: Context, method: str, metadata: Mapping[str, str], gate: AbstractContextManager[str | None], watcher: Watcher
) -> AsyncIterator[None]:
    start, facts, ended = time.monotonic(), watcher.new_facts(method, metadata), "CANCELLED"
    current_facts.set(facts)
    asked_id = metadata.get(REQUEST_ID_KEY)
    request_id = asked_id if asked_id is not None and _REQUEST_ID.fullmatch(asked_id) else uuid.uuid4().hex
    current_request_id.set(request_id)
    try:
        if asked_id not in (None, request_id):
            raise InvalidRequestError(REQUEST_ID_KEY, "must be 1 to 100 printable ASCII characters without spaces")
        await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
        with gate as key_name:
            current_key_name.set(key_name)
            yield
        ended = "OK"
    except MiiServeError as error:
        code, text, trailing = encode_error(error)
        ended = error.grpc_code
        await context.abort(code, text, trailing)
    except grpc.aio.BaseError:  # this very abort, or a call that is over
        raise
    except Exception:
        ended = "INTERNAL"
        logger.exception("unexpected error, request_id=%s", request_id)
        await context.abort(grpc.StatusCode.INTERNAL, f"internal error, request id {request_id}")
    finally:
        watcher.close(method, request_id, ended, time.monotonic() - start, facts)

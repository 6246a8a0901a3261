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

from mii_serve.errors import InvalidRequestError, MiiServeError
from mii_serve.proto.status import encode_error
from mii_serve.proto.writing import CallerTakesNothingError, Context, end_unread, write

logger = logging.getLogger(__name__)

REQUEST_ID_KEY = "x-request-id"
"""A caller's name for a call: echoed and logged, never used to tell calls apart, so that many calls may have the same one."""
CLIENT_ID_KEY = "x-client-id"
"""On whose behalf a call is made: how one address shares its part of a busy server among those it calls for."""
IDEMPOTENCY_KEY = "x-idempotency-key"
"""A caller's own name for a piece of work: the same name is worked on once and answered alike."""
MII_PACKAGES = ("legacymodelresponse", "modelresponse")
"""DeepSpeed-MII's, since 0.1.1 and before."""
_OWN = ("/mii_serve.", *(f"/{package}.ModelResponse/" for package in MII_PACKAGES))
_WORK = frozenset({"Generate", "GenerateStream", "Txt2ImgReply"})
MAX_ID_CHARS = 100
_ID = re.compile(rf"[!-~]{{1,{MAX_ID_CHARS}}}")
_CLIENT_ID = re.compile(rf"[ -~]{{1,{MAX_ID_CHARS}}}")
_INNER_ID = re.compile(rf"[!-~]{{1,{MAX_ID_CHARS + 20}}}( [0-9]+)?")
"""As the front calls requests towards its replicas: a number makes them unique, and no caller can write a space. The front may
also have added which part of a call it is."""


def is_work(method: str) -> bool:
    """Whether calls of this method make pictures: they count against a key's limits and get a line in the log.

    HTTP calls have the name "VERB /route".
    """
    return method.rpartition("/")[2] in _WORK or method.startswith("POST ")


def check_request_id(given: str) -> str:
    """The id, if it is one.

    Raises:
        InvalidRequestError: it breaks the rule.
    """
    return _checked(REQUEST_ID_KEY, given, _ID)


def check_idempotency_key(given: str) -> str:
    """The key, if it is one.

    Raises:
        InvalidRequestError: it breaks the rule.
    """
    return _checked(IDEMPOTENCY_KEY, given, _ID)


def check_client_id(given: str | None) -> str | None:
    """The id, if it is one or there is none.

    Raises:
        InvalidRequestError: it breaks the rule.
    """
    return None if given is None else _checked(CLIENT_ID_KEY, given, _CLIENT_ID, may_have_spaces=True)


def _checked(name: str, given: object, pattern: re.Pattern[str], *, may_have_spaces: bool = False) -> str:
    if not isinstance(given, str) or not pattern.fullmatch(given):
        rule = f"must be 1 to {MAX_ID_CHARS} printable ASCII characters" + ("" if may_have_spaces else " without spaces")
        raise InvalidRequestError(name, rule)
    return given


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
else:
    Handler = grpc.RpcMethodHandler


Entrance = Callable[[Context], AbstractAsyncContextManager[None]]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of our own services and of MII's; health and reflection answer for themselves.

    A `MiiServeError` ends the call with its own code and details. Anything else is a defect: INTERNAL with the request id for
    the caller, the traceback for the log.
    """

    def __init__(self, gate: Gate = open_gate, watcher: Watcher | None = None, *, is_inner: bool = False) -> None:
        """`is_inner`: the callers are fronts. They number their ids, and give up slow callers themselves."""
        self._gate = gate
        self._watcher = watcher or _Nobody()
        self._is_inner = is_inner

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Handler:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(_OWN):
            return handler
        metadata = {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}

        def entered(context: Context) -> AbstractAsyncContextManager[None]:
            gate = self._gate(details.method, metadata)
            id_pattern = _INNER_ID if self._is_inner else _ID
            return _entered(context, details.method, metadata, gate, self._watcher, id_pattern)

        parse = _checked_parser(handler.request_deserializer)
        wrap = _wrap_stream if handler.response_streaming else _wrap_unary
        method = handler.unary_stream if handler.response_streaming else handler.unary_unary
        # One answer is a stream of one on the wire too, and only what a handler writes by itself can be given up.
        call = wrap(method, parse, entered, is_bounded=not self._is_inner)
        return grpc.unary_stream_rpc_method_handler(call, None, handler.response_serializer)


def _checked_parser(parse: Any) -> Callable[[bytes], Any]:
    """Left to grpc itself, bytes that are no message would end as UNKNOWN with a traceback in the log."""

    def checked(wire: bytes) -> Any:
        try:
            return parse(wire)
        except DecodeError:
            raise InvalidRequestError("request", "must be a well-formed message with valid UTF-8 text") from None

    return checked


def _wrap_unary(method: Any, parse: Callable[[bytes], Any], entered: Entrance, *, is_bounded: bool) -> Any:
    async def call(wire: bytes, context: Context) -> None:
        async with entered(context):
            await write(context, await method(parse(wire), context), is_bounded=is_bounded)

    return call


def _wrap_stream(method: Any, parse: Callable[[bytes], Any], entered: Entrance, *, is_bounded: bool) -> Any:
    # Not a generator: a call cancelled in the middle of a write closes the messages here, and not when the collector comes.
    async def call(wire: bytes, context: Context) -> None:
        async with entered(context), contextlib.aclosing(method(parse(wire), context)) as messages:
            async for message in messages:
                await write(context, message, is_bounded=is_bounded)

    return call


@contextlib.asynccontextmanager
async def _entered(
    context: Context,
    method: str,
    metadata: Mapping[str, str],
    gate: AbstractContextManager[str | None],
    watcher: Watcher,
    id_pattern: re.Pattern[str],
) -> AsyncIterator[None]:
    start, facts, ended = time.monotonic(), watcher.new_facts(method, metadata), "CANCELLED"
    current_facts.set(facts)
    asked_id = metadata.get(REQUEST_ID_KEY)
    request_id = asked_id if asked_id is not None and id_pattern.fullmatch(asked_id) else uuid.uuid4().hex
    current_request_id.set(request_id)
    try:
        if asked_id is not None:
            _checked(REQUEST_ID_KEY, asked_id, id_pattern)
        await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
        with gate as key_name:
            current_key_name.set(key_name)
            yield
        ended = "OK"
    except CallerTakesNothingError as error:
        await end_unread(context, grpc.StatusCode.CANCELLED, str(error))
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

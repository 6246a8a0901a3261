"""The door of every HTTP call that costs something: its id, the gate, the ledger, and where errors become statuses.

A caller who hangs up, on a plain call or in the middle of a stream, has their work cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from mii_serve.errors import InvalidRequestError, MiiServeError, RequestCancelledError
from mii_serve.proto.interceptor import REQUEST_ID_KEY, current_facts, current_key_name, current_request_id
from mii_serve.server.desk import Desk, Visit, client_of
from mii_serve.server.keys import KeyRing
from mii_serve.server.ledger import Facts, Ledger

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1024 * 1024
MAX_DISCARDED_BYTES = 64 * 1024 * 1024
"""Of a body that is too large so much is read on and dropped: who is hung up on while sending does not hear the answer."""
BODY_TIMEOUT_S = 30.0
"""A body that trickles in must not hold a connection for ever."""
SEND_TIMEOUT_S = 60.0
"""A caller who takes in nothing for so long is taken to have gone."""


@dataclass(slots=True, kw_only=True)
class Call:
    """One HTTP call that was let in. `body` is its JSON value, None where it has none."""

    request: Request
    request_id: str
    client: str
    key_name: str | None
    facts: Facts
    body: Any = None
    started: float = field(default_factory=monotonic)

    def visit(self) -> Visit:
        """The circumstances of the call's one request."""
        return Visit(request_id=self.request_id, client=self.client, key_name=self.key_name, facts=self.facts)


@dataclass(frozen=True, slots=True)
class EventStream:
    """An answer that comes in pieces, as `text/event-stream`."""

    pieces: AsyncGenerator[bytes, None]


class Dialect(Protocol):
    """How one family of clients is told of errors."""

    def refusal(self, error: MiiServeError) -> Response: ...
    def broken_off(self, error: MiiServeError) -> bytes:
        """The last piece of a stream that cannot go on."""
        ...


Answer = Callable[[Call], Awaitable[Response | EventStream]]


class Door:
    """Makes routes out of answers."""

    def __init__(self, desk: Desk, keys: KeyRing) -> None:
        self._keys = keys
        self._ledger = Ledger(desk.metrics)

    def route(self, path: str, answer: Answer, dialect: Dialect, *, method: str = "POST", is_work: bool = True) -> Route:
        """`method` POST reads a JSON body. Only work counts against a key's limits."""
        return Route(path, _Doorway(self, f"{method} {path}", answer, dialect, is_work), methods=[method], name=path)

    @contextlib.asynccontextmanager
    async def entered(self, request: Request, method: str, reply: _Reply, *, is_work: bool) -> AsyncIterator[Call]:
        """Let the call in while the block runs, and answer what it raises."""
        start, facts, ended = monotonic(), self._ledger.new_facts(method, request.headers), "CANCELLED"
        request_id = str(uuid.uuid4())
        current_facts.set(facts)
        current_request_id.set(request_id)
        reply.headers[REQUEST_ID_KEY] = request_id
        try:
            with self._keys.admitted(request.headers.get("authorization"), is_work=is_work) as key_name:
                current_key_name.set(key_name)
                host = request.client.host if request.client is not None else "unknown"
                client = client_of(key_name, None, f"http {host}")
                yield Call(request=request, request_id=request_id, client=client, key_name=key_name, facts=facts)
            ended = "OK"
        except MiiServeError as error:
            ended = error.grpc_code
            await reply.refuse(error)
        except Exception:
            ended = "INTERNAL"
            logger.exception("unexpected error, request_id=%s", request_id)
            await reply.refuse(MiiServeError(f"internal error, request id {request_id}"))
        finally:
            self._ledger.close(method, request_id, ended, monotonic() - start, facts)


class _Doorway:
    """One route: an ASGI application, because how a call ends is known only after its last byte."""

    def __init__(self, door: Door, method: str, answer: Answer, dialect: Dialect, is_work: bool) -> None:
        self._door = door
        self._method = method
        self._answer = answer
        self._dialect = dialect
        self._is_work = is_work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, reply = Request(scope, receive), _Reply(self._dialect, scope, receive, send)
        async with self._door.entered(request, self._method, reply, is_work=self._is_work) as call:
            if request.method == "POST":
                call.body = await _read_json(request)
            await _while_there(receive, self._work(call, reply), reply)

    async def _work(self, call: Call, reply: _Reply) -> None:
        answer = await self._answer(call)
        if isinstance(answer, EventStream):
            await reply.stream(answer)
        else:
            await reply.give(answer)


class _Reply:
    """What goes back to one caller: a whole answer, or a stream; the call's own headers on either."""

    def __init__(self, dialect: Dialect, scope: Scope, receive: Receive, send: Send) -> None:
        self._dialect = dialect
        self._scope = scope
        self._receive = receive
        self._send = send
        self.headers: dict[str, str] = {}
        self.status: int | None = None
        self.has_nobody = False

    async def give(self, response: Response) -> None:
        for name, value in self.headers.items():
            response.headers.setdefault(name, value)
        self.status = response.status_code
        await response(self._scope, self._receive, self._sent)

    async def stream(self, answer: EventStream) -> None:
        async with contextlib.aclosing(answer.pieces) as pieces:
            headers = {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-store",
                "x-accel-buffering": "no",
            }
            raw = [(name.encode(), value.encode("latin-1")) for name, value in {**headers, **self.headers}.items()]
            self.status = 200
            await self._sent({"type": "http.response.start", "status": 200, "headers": raw})
            async for piece in pieces:
                await self._sent({"type": "http.response.body", "body": piece, "more_body": True})
        await self._sent({"type": "http.response.body", "body": b"", "more_body": False})

    async def refuse(self, error: MiiServeError) -> None:
        """Tell the caller, if they are there and have not been told the end yet."""
        if self.has_nobody:
            return
        with contextlib.suppress(RequestCancelledError):
            if self.status is None:
                await self.give(self._dialect.refusal(error))
            else:
                await self._sent({"type": "http.response.body", "body": self._dialect.broken_off(error), "more_body": False})

    async def _sent(self, message: Message) -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._send(message)
        except (TimeoutError, OSError):
            self.has_nobody = True
            raise RequestCancelledError("the caller takes in nothing") from None


async def _while_there(receive: Receive, work: Coroutine[Any, Any, None], reply: _Reply) -> None:
    """Do the work, unless the caller leaves before it is done.

    Raises:
        RequestCancelledError: they have left.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            reply.has_nobody = True
            raise RequestCancelledError("the caller has gone away")
        working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_json(request: Request) -> Any:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise InvalidRequestError("content-type", "must be application/json")
    body, num_bytes = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise RequestCancelledError("the caller has gone away")
                piece = message.get("body", b"")
                num_bytes += len(piece)
                if num_bytes <= MAX_BODY_BYTES:
                    body += piece
                if num_bytes > MAX_DISCARDED_BYTES or not message.get("more_body", False):
                    break
    except TimeoutError:
        raise InvalidRequestError("body", f"must arrive within {BODY_TIMEOUT_S:g} seconds") from None
    if num_bytes > MAX_BODY_BYTES:
        raise InvalidRequestError("body", f"must be at most {MAX_BODY_BYTES} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidRequestError("body", "must be JSON") from None

"""Every HTTP call that costs something passes here: its ids, its admission, and the answer or the error that it ends with.

`Endpoints` makes routes of handlers. A handler gets an `HttpCall` and returns a response or a stream of events; what it raises
becomes an error in the words of the route's dialect. A caller who hangs up, on a plain call or in the middle of a stream, has
their work cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from mii_serve import __version__
from mii_serve.config import HttpConfig
from mii_serve.errors import InvalidRequestError, MiiServeError, RequestCancelledError, UnavailableError
from mii_serve.gateway.errors import HeaderTooLongError
from mii_serve.gateway.json_body import read_json
from mii_serve.server.access_log import CallLog
from mii_serve.server.call import (
    AUTHORIZATION_KEY,
    IDEMPOTENCY_KEY,
    MAX_ID_CHARS,
    REQUEST_ID_KEY,
    TIMEOUT_KEY,
    Admission,
    CallContext,
    IncomingCall,
    check_timeout_s,
    network_of,
)

CLIENT_REQUEST_ID = "x-ms-client-request-id"
OLD_REQUEST_ID = "x-ms-request-id"
TRACE_ID = "traceid"
SERVER_VERSION = f"mii_serve/{__version__}"
KEEPALIVE_S = 15.0
"""Proxies close connections on which nothing is sent for a while, and a request may wait long in the queue."""
SEND_TIMEOUT_S = 60.0
"""A caller who takes in nothing for so long is taken to have gone."""
STOP_TIMEOUT_S = 0.5
"""For telling a caller that the server is stopping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpCall:
    """One HTTP call that was admitted. `body` is its JSON value, None where it has none."""

    request: Request
    context: CallContext
    body: Any = None


@dataclass(frozen=True, slots=True)
class EventStream:
    """An answer that comes in pieces, as `text/event-stream`."""

    pieces: AsyncGenerator[bytes, None]


class Dialect(Protocol):
    """How one family of clients reads errors."""

    def refusal(self, error: MiiServeError, request_id: str) -> Response: ...

    def last_event(self, error: MiiServeError, request_id: str) -> bytes:
        """The last piece of a stream that cannot go on."""
        ...


ReadBody = Callable[[Request], Awaitable[Any]]
ReadKey = Callable[[Mapping[str, str]], str | None]
"""The API key in headers, as `authorization` has it; None where there is none."""
Handler = Callable[[HttpCall], Awaitable[Response | EventStream]]


class Endpoints:
    """Makes routes of handlers: one admission and one set of bounds for all."""

    def __init__(self, admission: Admission, settings: HttpConfig) -> None:
        self.admission = admission
        self.settings = settings

    def route(
        self,
        path: str,
        handler: Handler,
        dialect: Dialect,
        *,
        method: str = "POST",
        is_work: bool = True,
        read: ReadBody | None = None,
        read_key: ReadKey | None = None,
    ) -> Route:
        """`method` POST reads a JSON body, or what `read` does. Only work counts against a key's limits."""
        endpoint = Endpoint(
            self, f"{method} {path}", handler, dialect, is_work, read or self._read_json, read_key or authorization_of
        )
        return Route(path, endpoint, methods=[method], name=path)

    async def _read_json(self, request: Request) -> Any:
        return await read_json(request, self.settings.max_body_bytes)


class Endpoint:
    """One route: an ASGI application, because how a call ends is known only after its last byte."""

    def __init__(
        self,
        endpoints: Endpoints,
        method: str,
        handler: Handler,
        dialect: Dialect,
        is_work: bool,
        read: ReadBody,
        read_key: ReadKey,
    ) -> None:
        self._endpoints = endpoints
        self._method = method
        self._handler = handler
        self.dialect = dialect
        self._is_work = is_work
        self._read = read
        self._read_key = read_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        call = self._incoming(request)
        reply = _Reply(self.dialect, call, scope, receive, send)

        async def work(context: CallContext) -> None:
            try:
                body = None
                if request.method == "POST":
                    body = await self._read(request)
                answering = self._answer(HttpCall(request=request, context=context, body=body), reply)
                await _unless_caller_leaves(receive, answering, reply)
            except asyncio.CancelledError:  # a server that stops has waited long enough for this caller
                reply.is_last = True
                raise UnavailableError("the server is stopping") from None

        await self._endpoints.admission.handle(call, work, reply.refuse)

    def _incoming(self, request: Request) -> IncomingCall:
        headers = dict(reversed(request.headers.items()))  # of a header that comes twice, the first counts
        timeout_s, problem = self._endpoints.settings.timeout_s, _too_long_id(headers)
        try:
            if (given := headers.get(TIMEOUT_KEY)) is not None:
                timeout_s = min(timeout_s, check_timeout_s(given))
        except InvalidRequestError as error:
            problem = problem or error
        if (authorization := self._read_key(headers)) is not None:
            headers[AUTHORIZATION_KEY] = authorization
        return IncomingCall(
            method=self._method,
            headers=headers,
            address=network_of(request.client.host if request.client is not None else "unknown"),
            timeout_s=timeout_s,
            idempotency_key=headers.get(IDEMPOTENCY_KEY, headers.get("idempotency-key")),
            is_work=self._is_work,
            problem=problem,
        )

    async def _answer(self, call: HttpCall, reply: _Reply) -> None:
        answer = await self._handler(call)
        if isinstance(answer, EventStream):
            await reply.stream(answer)
        else:
            await reply.send(answer)


class _Reply:
    """What goes back to one caller: a whole answer, or a stream; the call's own headers on either."""

    def __init__(self, dialect: Dialect, call: IncomingCall, scope: Scope, receive: Receive, send: Send) -> None:
        self._dialect = dialect
        self._scope = scope
        self._receive = receive
        self._send = send
        self._headers = _id_headers(call.headers, call.request_id)
        self._request_id = call.request_id
        self._log: CallLog = call.log
        self._has_begun = False
        self.has_left = False
        """The caller is gone."""
        self.is_last = False
        """The server is stopping and waits no longer than `STOP_TIMEOUT_S`."""

    async def send(self, response: Response) -> None:
        for name, value in self._headers.items():
            response.headers.setdefault(name, value)
        self._begin(response.status_code)
        await response(self._scope, self._receive, self._send_message)

    async def stream(self, answer: EventStream) -> None:
        async with contextlib.aclosing(answer.pieces) as pieces:
            headers = {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-store",
                "x-accel-buffering": "no",
            }
            raw = [(name.encode(), value.encode("latin-1")) for name, value in {**headers, **self._headers}.items()]
            self._begin(200)
            await self._send_message({"type": "http.response.start", "status": 200, "headers": raw})
            async with contextlib.aclosing(_with_keepalives(pieces)) as all_pieces:
                async for piece in all_pieces:
                    await self._send_message({"type": "http.response.body", "body": piece, "more_body": True})
        await self._send_message({"type": "http.response.body", "body": b"", "more_body": False})

    async def refuse(self, error: MiiServeError) -> None:
        """Send the error, if the caller is there and the answer has not ended yet."""
        if self.has_left:
            return
        with contextlib.suppress(RequestCancelledError):
            if not self.is_last:
                await self._refuse(error)
                return
            with contextlib.suppress(asyncio.CancelledError, TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._refuse(error)

    async def _refuse(self, error: MiiServeError) -> None:
        if not self._has_begun:
            await self.send(self._dialect.refusal(error, self._request_id))
        else:
            body = self._dialect.last_event(error, self._request_id)
            await self._send_message({"type": "http.response.body", "body": body, "more_body": False})

    def _begin(self, status: int) -> None:
        self._has_begun = True
        self._log["http_status"] = status

    async def _send_message(self, message: Message) -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._send(message)
        except (TimeoutError, OSError):
            self.has_left = True
            raise RequestCancelledError("the caller takes in nothing") from None


async def _with_keepalives(pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The pieces, and a comment, which clients pass over, whenever there has been none for so long."""
    while True:
        coming = asyncio.ensure_future(anext(pieces, None))
        try:
            while not (await asyncio.wait((coming,), timeout=KEEPALIVE_S))[0]:
                yield b": still here\n\n"
            piece = coming.result()
        finally:
            coming.cancel()
            # no generator can be closed while one of its pieces is awaited
            await asyncio.gather(coming, return_exceptions=True)
        if piece is None:
            return
        yield piece


async def _unless_caller_leaves(receive: Receive, work: Coroutine[Any, Any, None], reply: _Reply) -> None:
    """Do the work, unless the caller leaves before it is done.

    Raises:
        RequestCancelledError: the caller has left.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            reply.has_left = True
            raise RequestCancelledError("the caller has gone away")
        working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def authorization_of(headers: Mapping[str, str]) -> str | None:
    """The API key as `authorization` has it, from `api-key: KEY`, `authorization: Bearer KEY` or `authorization: KEY`."""
    if (key := headers.get("api-key")) is not None:
        return f"Bearer {key}"
    given = headers.get(AUTHORIZATION_KEY)
    if given is not None and given.strip() and " " not in given.strip():
        return f"Bearer {given.strip()}"
    return given


def _too_long_id(headers: Mapping[str, str]) -> MiiServeError | None:
    for name in (REQUEST_ID_KEY, CLIENT_REQUEST_ID, OLD_REQUEST_ID, TRACE_ID):
        if len(headers.get(name, "")) > MAX_ID_CHARS:
            return HeaderTooLongError(name, f"must be at most {MAX_ID_CHARS} characters")
    return None


def _id_headers(headers: Mapping[str, str], request_id: str) -> dict[str, str]:
    """As Azure ML's inference server gives ids back."""
    client_id = headers.get(CLIENT_REQUEST_ID, headers.get(OLD_REQUEST_ID, ""))[:MAX_ID_CHARS]
    found = {REQUEST_ID_KEY: request_id, OLD_REQUEST_ID: client_id or request_id, "x-ms-server-version": SERVER_VERSION}
    if client_id:
        found[CLIENT_REQUEST_ID] = client_id
    if trace := headers.get(TRACE_ID, "")[:MAX_ID_CHARS]:
        found["TraceId"] = trace
    return found

"""The door of every HTTP call that costs something: ids, the gate, the ledger, and the one place where errors become answers.

A caller who hangs up, on a plain call or in the middle of a stream, has their work cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from mii_serve import __version__
from mii_serve.config import HttpConfig
from mii_serve.errors import InvalidRequestError, MiiServeError, RequestCancelledError, UnavailableError
from mii_serve.gateway.bodies import read_json
from mii_serve.gateway.problems import HeaderTooLongError
from mii_serve.proto.interceptor import (
    CLIENT_ID_KEY,
    IDEMPOTENCY_KEY,
    MAX_ID_CHARS,
    REQUEST_ID_KEY,
    check_client_id,
    check_request_id,
    current_facts,
    current_key_name,
    current_request_id,
)
from mii_serve.proto.writing import network_of
from mii_serve.server.desk import Desk, Visit, client_of, deadline_in
from mii_serve.server.keys import KeyRing
from mii_serve.server.ledger import Facts, Ledger

logger = logging.getLogger(__name__)

CLIENT_REQUEST_ID = "x-ms-client-request-id"
OLD_REQUEST_ID = "x-ms-request-id"
TRACE_ID = "traceid"
TIMEOUT_HEADER = "x-request-timeout-s"
"""Seconds the caller waits at most; the configured bound where it is left out."""
SERVER_VERSION = f"mii_serve/{__version__}"
KEEPALIVE_S = 15.0
"""Proxies hang up on connections that say nothing for a while; a wait in line is long and silent."""
SEND_TIMEOUT_S = 60.0
"""A caller who takes in nothing for so long is taken to have gone."""
LAST_WORD_S = 0.5
"""For a caller to be told that the server is stopping."""
_TIMEOUT = re.compile(r"\d{1,9}(\.\d{1,9})?")


@dataclass(slots=True, kw_only=True)
class Call:
    """One HTTP call that was let in. `body` is its JSON value, None where it has none."""

    request: Request
    request_id: str
    client: str
    key_name: str | None
    facts: Facts
    deadline: float | None
    body: Any = None
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since it came in."""
        return time.monotonic() - self.started

    def visit(self, part: int | None = None) -> Visit:
        """The circumstances of the call's one request, or of one `part` of many."""
        headers = self.request.headers
        visit = Visit(
            request_id=self.request_id,
            client=self.client,
            deadline=self.deadline,
            key_name=self.key_name,
            idempotency_key=headers.get(IDEMPOTENCY_KEY, headers.get("idempotency-key")),
            part=part,
            facts=self.facts,
        )
        return visit if part is None else visit.named_part(f".{part}")


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

    def __init__(self, desk: Desk, keys: KeyRing, settings: HttpConfig) -> None:
        self._keys = keys
        self._ledger = Ledger(desk.metrics)
        self.settings = settings

    def route(self, path: str, answer: Answer, dialect: Dialect, *, method: str = "POST", is_work: bool = True) -> Route:
        """`method` POST reads a JSON body. Only work counts against a key's limits."""
        return Route(path, Doorway(self, f"{method} {path}", answer, dialect, is_work), methods=[method], name=path)

    async def attend(
        self, request: Request, method: str, reply: _Reply, work: Callable[[Call], Awaitable[None]], *, is_work: bool
    ) -> None:
        """Let the call in, have the `work` done for it, and answer whatever is raised on the way."""
        headers = request.headers
        start, facts, ended = time.monotonic(), self._ledger.new_facts(method, headers), "CANCELLED"
        current_facts.set(facts)
        request_id, problem = _request_id(headers)
        reply.headers |= _id_headers(headers, request_id)
        current_request_id.set(request_id)
        try:
            if problem is not None:
                raise problem
            with self._keys.admitted(authorization_of(headers), is_work=is_work) as key_name:
                current_key_name.set(key_name)
                host = request.client.host if request.client is not None else "unknown"
                named = check_client_id(headers.get(CLIENT_ID_KEY))
                call = Call(
                    request=request,
                    request_id=request_id,
                    client=client_of(key_name, named, network_of(host)),
                    key_name=key_name,
                    facts=facts,
                    deadline=deadline_in(self._time_left_s(headers)),
                    started=start,
                )
                await work(call)
            ended = "OK"
        except MiiServeError as error:
            ended = error.grpc_code
            await reply.refuse(error)
        except asyncio.CancelledError:  # a server that stops has waited long enough for this caller
            ended = UnavailableError.grpc_code
            with contextlib.suppress(asyncio.CancelledError, TimeoutError):
                async with asyncio.timeout(LAST_WORD_S):
                    await reply.refuse(UnavailableError("the server is stopping"))
        except Exception:
            ended = "INTERNAL"
            logger.exception("unexpected error, request_id=%s", request_id)
            await reply.refuse(MiiServeError(f"internal error, request id {request_id}"))
        finally:
            if reply.status is not None:
                facts["http_status"] = reply.status
            self._ledger.close(method, request_id, ended, time.monotonic() - start, facts)

    def _time_left_s(self, headers: Headers) -> float:
        text = headers.get(TIMEOUT_HEADER)
        if text is None:
            return self.settings.timeout_s
        if not _TIMEOUT.fullmatch(text) or not float(text) > 0:
            raise InvalidRequestError(TIMEOUT_HEADER, "must be a number of seconds above 0", repr(text[:20]))
        return min(float(text), self.settings.timeout_s)


class Doorway:
    """One route: an ASGI application, because how a call ends is known only after its last byte."""

    def __init__(self, door: Door, method: str, answer: Answer, dialect: Dialect, is_work: bool) -> None:
        self._door = door
        self._method = method
        self._answer = answer
        self.dialect = dialect
        self._is_work = is_work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, reply = Request(scope, receive), _Reply(self.dialect, scope, receive, send)

        async def work(call: Call) -> None:
            if request.method == "POST":
                call.body = await read_json(request, self._door.settings.max_body_bytes)
            await _while_there(receive, self._answered(call, reply), reply)

        await self._door.attend(request, self._method, reply, work, is_work=self._is_work)

    async def _answered(self, call: Call, reply: _Reply) -> None:
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
            async with contextlib.aclosing(_kept_alive(pieces)) as all_pieces:
                async for piece in all_pieces:
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


async def _kept_alive(pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The pieces, and a comment, which clients pass over, whenever there has been none for so long."""
    while True:
        coming = asyncio.ensure_future(anext(pieces, None))
        try:
            while not (await asyncio.wait((coming,), timeout=KEEPALIVE_S))[0]:
                yield b": still here\n\n"
            piece = coming.result()
        finally:
            coming.cancel()
            await asyncio.gather(
                coming, return_exceptions=True
            )  # no generator can be closed while one of its pieces is awaited
        if piece is None:
            return
        yield piece


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


def authorization_of(headers: Mapping[str, str]) -> str | None:
    """The API key as `authorization` has it, from `api-key: KEY`, `authorization: Bearer KEY` or `authorization: KEY`."""
    if (key := headers.get("api-key")) is not None:
        return f"Bearer {key}"
    given = headers.get("authorization")
    if given is not None and given.strip() and " " not in given.strip():
        return f"Bearer {given.strip()}"
    return given


def _request_id(headers: Headers) -> tuple[str, MiiServeError | None]:
    """The call's id, and what is wrong with those that came with it."""
    for name in (REQUEST_ID_KEY, CLIENT_REQUEST_ID, OLD_REQUEST_ID, TRACE_ID):
        if len(headers.get(name, "")) > MAX_ID_CHARS:
            return uuid.uuid4().hex, HeaderTooLongError(name, f"must be at most {MAX_ID_CHARS} characters")
    asked = headers.get(REQUEST_ID_KEY)
    if asked is None:
        return str(uuid.uuid4()), None
    try:
        return check_request_id(asked), None
    except InvalidRequestError as problem:
        return str(uuid.uuid4()), problem


def _id_headers(headers: Headers, request_id: str) -> dict[str, str]:
    """As Azure ML's inference server gives ids back."""
    client_id = headers.get(CLIENT_REQUEST_ID, headers.get(OLD_REQUEST_ID, ""))[:MAX_ID_CHARS]
    found = {REQUEST_ID_KEY: request_id, OLD_REQUEST_ID: client_id or request_id, "x-ms-server-version": SERVER_VERSION}
    if client_id:
        found[CLIENT_REQUEST_ID] = client_id
    if trace := headers.get(TRACE_ID, "")[:MAX_ID_CHARS]:
        found["TraceId"] = trace
    return found

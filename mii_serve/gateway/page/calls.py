"""The calls the page makes: `/ui/info`, `/ui/state`, and `/ui/generate`, which answers with Server-Sent Events.

A call that is refused before anything was done is an HTTP error; what goes wrong later is the stream's last event. Closing
the tab closes the connection, and that cancels the work.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncGenerator

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mii_serve.errors import InvalidRequestError, MiiServeError, QueueFullError, UnavailableError
from mii_serve.gateway.door import Call, Door, EventStream
from mii_serve.gateway.page.files import PLACE, PageFiles
from mii_serve.gateway.page.messages import event_told, info_told, read_request, state_told
from mii_serve.proto.interceptor import current_request_id
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.server.desk import Desk

FRESH_S = 0.5
"""Any number of open pages asks the replicas how busy they are no more often than this."""

_NO_STORE = {"cache-control": "no-store"}


def page_routes(desk: Desk, door: Door, files: PageFiles) -> list[Route]:
    """Everything of the page but `/` itself, which it shares with probes."""
    calls, dialect = PageCalls(desk), PageDialect()
    return [
        Route(PLACE + "/{version}/{name}", files.asset),
        door.route("/ui/info", calls.info, dialect, method="GET", is_work=False),
        door.route("/ui/state", calls.state, dialect, method="GET", is_work=False),
        door.route("/ui/generate", calls.generate, dialect),
    ]


class PageDialect:
    """Errors as the page reads them; `field` and `rule` where one parameter is to blame."""

    def refusal(self, error: MiiServeError) -> Response:
        headers = dict(_NO_STORE)
        if error.http_status == 401:
            headers["www-authenticate"] = "Bearer"
        if isinstance(error, QueueFullError) and error.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        return JSONResponse({"error": _error_told(error)}, error.http_status, headers)

    def broken_off(self, error: MiiServeError) -> bytes:
        return _piece("error", _error_told(error))


class PageCalls:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._asking = asyncio.Lock()
        self._known: pb.GetServerInfoResponse | UnavailableError | None = None
        self._known_at = float("-inf")

    async def info(self, call: Call) -> Response:
        return JSONResponse(info_told(await self._desk.server_info(), self._desk.grpc_port), headers=_NO_STORE)

    async def state(self, call: Call) -> Response:
        async with self._asking:
            if self._known is None or time.monotonic() - self._known_at > FRESH_S:
                try:
                    self._known = await self._desk.server_info()
                except UnavailableError as error:  # replicas that hang take their time to say nothing
                    self._known = error
                self._known_at = time.monotonic()
        if isinstance(self._known, UnavailableError):
            raise UnavailableError(str(self._known))
        return JSONResponse(state_told(self._known), headers=_NO_STORE)

    async def generate(self, call: Call) -> EventStream:
        site = call.request.headers.get("sec-fetch-site", "same-origin")
        if site not in ("same-origin", "none"):  # another site's page must not put its visitors to work here
            raise InvalidRequestError("sec-fetch-site", "must be this server's own page", repr(site[:20]))
        events = self._desk.events(read_request(call.body), call.visit())
        try:
            first = await anext(events)
        except BaseException:
            await events.aclose()
            raise
        return EventStream(_pieces(first, events))


async def _pieces(first: pb.GenerateEvent, events: AsyncGenerator[pb.GenerateEvent, None]) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(events):
        yield _piece(*event_told(first))
        async for event in events:
            yield _piece(*event_told(event))


def _piece(name: str, value: dict[str, object]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(value)}\n\n".encode()


def _error_told(error: MiiServeError) -> dict[str, object]:
    answer: dict[str, object] = {"code": error.grpc_code, "message": str(error), "request_id": current_request_id.get()}
    if isinstance(error, InvalidRequestError):
        answer |= {"field": error.field, "rule": str(error).removeprefix(f"{error.field}: ")}
    if isinstance(error, QueueFullError) and error.retry_after_s is not None:
        answer["retry_after_s"] = error.retry_after_s
    return answer

"""The page's calls: `/ui/info`, `/ui/state`, and `/ui/generate`, which answers with Server-Sent Events.

A call that is refused before anything was done is an HTTP error; what goes wrong later is the stream's last event. Closing
the tab closes the connection, and that cancels the work.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mii_serve.errors import InvalidRequestError, MiiServeError, QueueFullError, UnavailableError
from mii_serve.gateway.errors import MediaTypeError
from mii_serve.gateway.json_body import json_value, read_json
from mii_serve.gateway.middleware import Endpoints, EventStream, HttpCall
from mii_serve.gateway.multipart import read_form
from mii_serve.gateway.page.files import PATH, PageFiles
from mii_serve.gateway.page.jobs import PageJobs
from mii_serve.gateway.page.messages import event_to_json, info_to_json, parse, state_to_json
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.jobs import Jobs
from mii_serve.types import MAX_IMAGE_BYTES, Event, ServerInfo

FRESH_S = 0.5
"""Any number of open pages asks the replicas how busy they are no more often than this."""

VALUE, FILES = "request", ("image", "mask_image")
"""The parts of a form."""
PAGE_HEADER = "x-mii-page"
MAX_FORM_BYTES = MAX_IMAGE_BYTES + 1024 * 1024

_NO_STORE = {"cache-control": "no-store"}


def page_routes(dispatcher: Dispatcher, endpoints: Endpoints, files: PageFiles, jobs: Jobs | None = None) -> list[Route]:
    """Everything of the page but `/` itself, which it shares with probes. Without `jobs` the page has none."""
    calls, dialect = PageCalls(dispatcher, has_jobs=jobs is not None), PageDialect()

    async def read(request: Request) -> Asked:
        return await read_asked(request, endpoints.settings.max_body_bytes)

    listed = () if jobs is None else (endpoints.route("/ui/jobs", PageJobs(jobs).list, dialect, method="GET", is_work=False),)
    return [
        *listed,
        Route(PATH + "/{version}/{name}", files.asset),
        endpoints.route("/ui/info", calls.info, dialect, method="GET", is_work=False),
        endpoints.route("/ui/state", calls.state, dialect, method="GET", is_work=False),
        endpoints.route("/ui/generate", calls.generate, dialect, read=read),
    ]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the page sends: a JSON value, and the images of a request that starts from one."""

    value: Any
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)


async def read_asked(request: Request, max_bytes: int) -> Asked:
    """A JSON body, or a form with the JSON value as its field `request` and the images as files.

    Raises:
        BodyTooLargeError, MediaTypeError, InvalidRequestError: naming the rule.
        RequestCancelledError: the caller left before the body was complete.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return Asked(await read_json(request, max_bytes))
    if PAGE_HEADER not in request.headers:  # a form alone may come from any site's page
        raise MediaTypeError("content-type", f"must be application/json without the header {PAGE_HEADER}")
    form = await read_form(request, MAX_FORM_BYTES, FILES)
    for name in form.fields:
        if name != VALUE:
            raise InvalidRequestError(name[:80], f"is not known here; {VALUE}, {' and '.join(FILES)} are")
    return Asked(json_value(form.fields.get(VALUE, "").encode()), form.files)


class PageDialect:
    """Errors as the page reads them; `field` and `rule` where one parameter is to blame."""

    def refusal(self, error: MiiServeError, request_id: str) -> Response:
        headers = dict(_NO_STORE)
        if error.http_status == 401:
            headers["www-authenticate"] = "Bearer"
        if isinstance(error, QueueFullError) and error.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        return JSONResponse({"error": _error_to_json(error, request_id)}, error.http_status, headers)

    def last_event(self, error: MiiServeError, request_id: str) -> bytes:
        return _piece("error", _error_to_json(error, request_id))


class PageCalls:
    def __init__(self, dispatcher: Dispatcher, *, has_jobs: bool = False) -> None:
        self._dispatcher = dispatcher
        self._has_jobs = has_jobs
        self._asking = asyncio.Lock()
        self._known: ServerInfo | UnavailableError | None = None
        self._known_at = float("-inf")

    async def info(self, call: HttpCall) -> Response:
        info = await self._dispatcher.server_info()
        known = {**info_to_json(info, self._dispatcher.grpc_port), "has_jobs": self._has_jobs}
        return JSONResponse(known, headers=_NO_STORE)

    async def state(self, call: HttpCall) -> Response:
        async with self._asking:
            if self._known is None or time.monotonic() - self._known_at > FRESH_S:
                try:
                    self._known = await self._dispatcher.server_info()
                except UnavailableError as error:  # a replica that hangs is found out only after a while
                    self._known = error
                self._known_at = time.monotonic()
        if isinstance(self._known, UnavailableError):
            raise UnavailableError(str(self._known))
        return JSONResponse(state_to_json(self._known), headers=_NO_STORE)

    async def generate(self, call: HttpCall) -> EventStream:
        site = call.request.headers.get("sec-fetch-site", "same-origin")
        if site not in ("same-origin", "none"):  # another site's page must not use the server through its visitors' browsers
            raise InvalidRequestError("sec-fetch-site", "must be this server's own page", repr(site[:20]))
        asked: Asked = call.body
        events = self._dispatcher.events(parse(asked.value, asked.files), call.context)
        try:
            first = await anext(events)
        except BaseException:
            await events.aclose()
            raise
        return EventStream(_pieces(first, events, call.context.request_id))


async def _pieces(first: Event, events: AsyncGenerator[Event, None], request_id: str) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(events):
        yield _piece(*event_to_json(first, request_id))
        async for event in events:
            yield _piece(*event_to_json(event, request_id))


def _piece(name: str, value: dict[str, object]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(value)}\n\n".encode()


def _error_to_json(error: MiiServeError, request_id: str) -> dict[str, object]:
    answer: dict[str, object] = {"code": error.grpc_code, "message": str(error), "request_id": request_id}
    if isinstance(error, InvalidRequestError):
        answer |= {"field": error.field, "rule": str(error).removeprefix(f"{error.field}: ")}
    if isinstance(error, QueueFullError) and error.retry_after_s is not None:
        answer["retry_after_s"] = error.retry_after_s
    return answer

"""Pages of other origins may use this server, where the operator names the origins (CORS, the Fetch standard).

A browser lets a page read an answer, and send more than a form could, only if the answer allows the page's origin. Nothing here
looks at keys: a browser asks first (the preflight) without any. Answers never allow credentials: the server has no cookies, and
a page that has an API key sends it itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ALL = "*"
MAX_AGE_S = 600
"""A browser may remember for so long what a preflight said."""
METHODS = ("GET", "HEAD", "POST", "DELETE")
EXPOSED = (
    *("x-request-id", "x-ms-request-id", "x-ms-client-request-id", "traceid", "x-ms-run-fn-exec-ms"),
    *("x-mii-seed", "x-mii-seeds", "x-mii-nsfw-content-detected", "x-mii-provenance"),
    *("x-mii-dropped-prompt", "x-mii-dropped-negative-prompt"),
    *("retry-after", "x-should-retry"),
)
"""Headers of answers that pages may read."""
_HEADER_NAMES = re.compile(r"[0-9A-Za-z!#$%&'*+.^_`|~, -]{1,1000}", re.ASCII)


class Origins:
    """The origins whose pages may use the server; `*` is every one. `allows` is about what stands in the header `Origin`."""

    def __init__(self, origins: Iterable[str] = ()) -> None:
        self._origins = frozenset(origin.lower() for origin in origins)

    @property
    def is_on(self) -> bool:
        return bool(self._origins)

    @property
    def allow_all(self) -> bool:
        return ALL in self._origins

    def allows(self, origin: str) -> bool:
        return self.allow_all or origin in self._origins


class Cors:
    """ASGI middleware: answers preflights, and adds to other answers what their origins may read."""

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        is_allowed = origin is not None and self._origins.allows(origin)
        if scope["method"] == "OPTIONS" and origin is not None and "access-control-request-method" in headers:
            await self._preflight(headers, is_allowed)(scope, receive, send)
            return

        async def send_allowed(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._allow(MutableHeaders(scope=message), origin if is_allowed else None)
            await send(message)

        await self._app(scope, receive, send_allowed)

    def _allow(self, headers: MutableHeaders, origin: str | None) -> None:
        """Let pages of this origin read the answer; None for no page."""
        if not self._origins.allow_all:
            headers.add_vary_header("origin")  # a cache must not give the answer to another origin
        if origin is not None:
            headers["access-control-allow-origin"] = ALL if self._origins.allow_all else origin
            headers["access-control-expose-headers"] = ", ".join(EXPOSED)

    def _preflight(self, asked: Headers, is_allowed: bool) -> Response:
        response = Response(status_code=204 if is_allowed else 403)
        self._allow(response.headers, asked["origin"] if is_allowed else None)
        if is_allowed:
            del response.headers["access-control-expose-headers"]
            response.headers["access-control-allow-methods"] = ", ".join(METHODS)
            response.headers["access-control-max-age"] = str(MAX_AGE_S)
            names = asked.get("access-control-request-headers", "")
            if _HEADER_NAMES.fullmatch(names):
                response.headers["access-control-allow-headers"] = names
            if asked.get("access-control-request-private-network") == "true":
                response.headers["access-control-allow-private-network"] = "true"
            response.headers.add_vary_header("access-control-request-headers")
        return response

"""Paths are normalized: `/v1/models/`, `/v1//models` and `GET http://host/v1/models` are `/v1/models`."""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

_ABSOLUTE = re.compile(rb"https?://(?P<host>[^/?#]*)(?P<path>/.*)?", re.IGNORECASE | re.DOTALL)
_SLASHES = re.compile(r"/{2,}")


class NormalizedPaths:
    """Middleware: what is behind it sees paths without doubled and trailing slashes, and never a request for a whole address.

    Of a whole address the host stands for the header `Host`, as RFC 9112 (3.2.2) requires.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = _normalized(scope)
        await self._app(scope, receive, send)


def _normalized(scope: Scope) -> Scope:
    path, raw, headers = scope["path"], scope.get("raw_path") or b"", scope["headers"]
    if (whole := _ABSOLUTE.fullmatch(raw)) is not None:
        raw = whole["path"] or b"/"
        path = re.sub(r"^[^:/]*://[^/?#]*", "", path) or "/"
        headers = [(b"host", whole["host"]), *((name, value) for name, value in headers if name != b"host")]
    path = _SLASHES.sub("/", path)
    if path != "/":
        path = path.rstrip("/")
    return {**scope, "path": path, "raw_path": raw, "headers": headers}

"""The page's own files, read once: HTML, CSS and scripts as they lie in `assets/`. Nothing is fetched from anywhere else.

All but the HTML live below a path that holds a digest of them all, so browsers may keep them for ever and never mix versions.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

ASSETS = Path(__file__).parent / "assets"
PATH = "/ui/assets"
MARK = "{{assets}}"
"""Stands in the HTML for the folder of the other files."""

_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
SECURITY_HEADERS = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_FOR_EVER = "public, max-age=31536000, immutable"


@dataclass(frozen=True, slots=True)
class _Asset:
    content: bytes
    zipped: bytes
    kind: str
    tag: str

    @classmethod
    def of(cls, content: bytes, kind: str) -> _Asset:
        tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
        return cls(content, gzip.compress(content, 9, mtime=0), f"{kind}; charset=utf-8", tag)

    def answer(self, request: Request, cache_control: str, vary: str) -> Response:
        headers = {**SECURITY_HEADERS, "cache-control": cache_control, "etag": self.tag, "vary": vary}
        if request.headers.get("if-none-match") == self.tag:
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(self.zipped, headers={**headers, "content-encoding": "gzip", "content-type": self.kind})
        return Response(self.content, headers={**headers, "content-type": self.kind})


class PageFiles:
    """Answers for the page itself and for what it loads."""

    def __init__(self, folder: Path = ASSETS) -> None:
        contents = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in _KINDS}
        digest = hashlib.sha256()
        for name, content in contents.items():
            digest.update(f"{name} {len(content)} ".encode() + content)
        self._version = digest.hexdigest()[:16]
        html = contents.pop("index.html").decode().replace(MARK, f"{PATH}/{self._version}")
        self._page = _Asset.of(html.encode(), _KINDS[".html"])
        self._files = {name: _Asset.of(content, _KINDS[Path(name).suffix]) for name, content in contents.items()}

    def page(self, request: Request) -> Response:
        return self._page.answer(request, "no-cache", "accept, accept-encoding")

    async def asset(self, request: Request) -> Response:
        file = self._files.get(request.path_params["name"])
        if file is None:
            return PlainTextResponse("no such file", 404)
        is_current = request.path_params["version"] == self._version
        return file.answer(request, _FOR_EVER if is_current else "no-cache", "accept-encoding")


def wants_page(request: Request) -> bool:
    """Whether a browser asks, that shows pages to a person; probes do not name HTML."""
    return "text/html" in request.headers.get("accept", "").lower()

"""Pictures behind addresses of this server, for clients that want a `url`: few, for a while, without a key.

An address is 256 random bits, which is why it needs no API key: clients hand it on to something that has none. It lives for
`KEPT_S`, shorter where `MAX_KEPT_BYTES` are exceeded, and not beyond the end of this process.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response

from mii_serve.gateway.problems import NotFoundError, openai_problem, problem_response

KEPT_S = 600.0
MAX_KEPT_BYTES = 64 * 1024 * 1024
"""Of all pictures together; the oldest go first."""
PLACE = "/v1/images/files"


@dataclass(frozen=True, slots=True)
class _Kept:
    content: bytes = field(repr=False)
    media_type: str
    until: float


class KeptPictures:
    """The pictures that have an address now."""

    def __init__(self, *, max_bytes: int = MAX_KEPT_BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._num_bytes = 0
        self._max_bytes = max_bytes
        self._clock = clock

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def keep(self, content: bytes, format: str) -> str:
        """Keep a picture, and give the path it is at."""
        name = f"{secrets.token_urlsafe(32)}.{format}"
        self._kept[name] = _Kept(content, f"image/{format}", self._clock() + KEPT_S)
        self._num_bytes += len(content)
        self._forget_old()
        return f"{PLACE}/{name}"

    async def answer(self, request: Request) -> Response:
        """The bytes of one picture."""
        self._forget_old()
        kept = self._kept.get(request.path_params["name"])
        if kept is None:
            gone = NotFoundError(f"there is no such picture; one is kept for {KEPT_S / 60:g} minutes at most", "file_not_found")
            return problem_response(openai_problem(gone), {"cache-control": "no-store"})
        headers = {
            "cache-control": f"private, max-age={max(0, int(kept.until - self._clock()))}, immutable",
            "content-security-policy": "default-src 'none'; sandbox",
            "x-content-type-options": "nosniff",
        }
        return Response(kept.content, 200, headers, kept.media_type)

    def _forget_old(self) -> None:
        while self._kept:
            name, oldest = next(iter(self._kept.items()))
            if self._num_bytes <= self._max_bytes and oldest.until > self._clock():
                break
            self._num_bytes -= len(oldest.content)
            del self._kept[name]


def base_url(request: Request, public_url: str | None) -> str:
    """What the caller reaches this server by: as configured, else as the request itself says it."""
    return public_url.rstrip("/") if public_url is not None else f"{request.url.scheme}://{request.url.netloc}"

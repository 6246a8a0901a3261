"""Images behind addresses of this server, for clients that want a `url`: few, for a while, without a key.

An address is 256 random bits, which is why it needs no API key: clients hand it on to something that has none. It is valid for
`STORED_S`, shorter where `MAX_STORED_BYTES` are exceeded, and not beyond the end of this process.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response

from mii_serve.errors import NotFoundError
from mii_serve.gateway.errors import openai_problem, problem_response

STORED_S = 600.0
MAX_STORED_BYTES = 64 * 1024 * 1024
"""Of all images together; the oldest are dropped first."""
PATH = "/v1/images/files"


@dataclass(frozen=True, slots=True)
class _StoredImage:
    content: bytes = field(repr=False)
    media_type: str
    until: float


class ImageStore:
    """The images that have an address now."""

    def __init__(self, *, max_bytes: int = MAX_STORED_BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        self._images: OrderedDict[str, _StoredImage] = OrderedDict()
        self._num_bytes = 0
        self._max_bytes = max_bytes
        self._clock = clock

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def add(self, content: bytes, format: str) -> str:
        """Store an image; returns its path."""
        name = f"{secrets.token_urlsafe(32)}.{format}"
        self._images[name] = _StoredImage(content, f"image/{format}", self._clock() + STORED_S)
        self._num_bytes += len(content)
        self._drop_old()
        return f"{PATH}/{name}"

    async def answer(self, request: Request) -> Response:
        """The bytes of one image."""
        self._drop_old()
        image = self._images.get(request.path_params["name"])
        if image is None:
            gone = NotFoundError(f"there is no such image; one is kept for {STORED_S / 60:g} minutes at most", "file_not_found")
            return problem_response(openai_problem(gone), {"cache-control": "no-store"})
        headers = {
            "cache-control": f"private, max-age={max(0, int(image.until - self._clock()))}, immutable",
            "content-security-policy": "default-src 'none'; sandbox",
            "x-content-type-options": "nosniff",
        }
        return Response(image.content, 200, headers, image.media_type)

    def _drop_old(self) -> None:
        while self._images:
            name, oldest = next(iter(self._images.items()))
            if self._num_bytes <= self._max_bytes and oldest.until > self._clock():
                break
            self._num_bytes -= len(oldest.content)
            del self._images[name]


def base_url(request: Request, public_url: str | None) -> str:
    """What the caller reaches this server by: as configured, else as the request itself says it."""
    return public_url.rstrip("/") if public_url is not None else f"{request.url.scheme}://{request.url.netloc}"

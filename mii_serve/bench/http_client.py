"""HTTP for the load generator: addresses, and httpx with the settings a measurement needs."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mii_serve.errors import ConfigError

if TYPE_CHECKING:
    import httpx2

MAX_BODY_BYTES = 256 * 1024 * 1024
KEEP_IDLE_S = 2.0
"""An idle connection is reused for this long. Servers keep theirs longer (uvicorn 5 s, by default), so that no request is sent
on a connection that the server is closing.
"""


class AnswerTooLargeError(Exception):
    """The body has more than `MAX_BODY_BYTES`."""


def http_address(text: str) -> str:
    """`http://HOST:PORT` of an address without a scheme; one with `http://` or `https://` keeps it, and its path.

    Raises:
        ConfigError: it is neither.
    """
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
    except ValueError as error:
        raise ConfigError("target", f"is no URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise ConfigError("target", f"must be http://HOST:PORT, https://HOST:PORT or HOST:PORT, got {text!r}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port or (443 if parts.scheme == 'https' else 80)}{parts.path.rstrip('/')}"


def open_client(
    address: str, *, tls: ssl.SSLContext | None = None, headers: Mapping[str, str] | None = None
) -> httpx2.AsyncClient:
    """A client that opens as many connections as there are requests, sends no request twice, and heeds no proxy variable.

    It has no timeouts of its own: callers bound each request.
    """
    import httpx2

    return httpx2.AsyncClient(
        base_url=address,
        verify=tls if tls is not None else True,
        headers={"user-agent": "mii_serve bench", "accept-encoding": "identity", **(headers or {})},
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_IDLE_S),
        timeout=None,
        trust_env=False,
    )


async def read_body(response: httpx2.Response) -> bytes:
    """The whole body.

    Raises:
        AnswerTooLargeError
        httpx2.HTTPError: the connection broke.
    """
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise AnswerTooLargeError(f"the answer is larger than {MAX_BODY_BYTES} bytes")
    return bytes(body)

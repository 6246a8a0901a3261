"""As much of an HTTP/1.1 client as a load generator needs: one request at a time on a connection, connections kept for the
next.

h11 reads and writes the protocol; this adds sockets, TLS and a pool. No redirects, no proxies, no cookies.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11

from mii_serve.errors import ConfigError

MAX_BODY_BYTES = 256 * 1024 * 1024
READ_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Url:
    """Where a server is; `path` is what is put before every request's path."""

    host: str
    port: int
    is_tls: bool
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Url:
        """Read `http://HOST:PORT`, `https://…` or `HOST:PORT`.

        Raises:
            ConfigError: it is none of them.
        """
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            port = parts.port
        except ValueError as error:
            raise ConfigError("target", f"is no URL: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ConfigError("target", f"must be http://HOST:PORT, https://HOST:PORT or HOST:PORT, got {text!r}")
        is_tls = parts.scheme == "https"
        return cls(host=parts.hostname, port=port or (443 if is_tls else 80), is_tls=is_tls, path=parts.path.rstrip("/"))


class HttpError(Exception):
    """The connection or the protocol failed; a status of the server's is not an error here."""


@dataclass(slots=True, eq=False)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    protocol: h11.Connection


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]

    async def read(self) -> bytes:
        """The whole body.

        Raises:
            HttpError: it breaks off, or is larger than `MAX_BODY_BYTES`.
        """
        body = bytearray()
        async for chunk in self.chunks:
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise HttpError(f"the answer is larger than {MAX_BODY_BYTES} bytes")
        return bytes(body)


class HttpPool:
    """Connections to one server; as many as requests are under way, kept open between them."""

    def __init__(self, url: Url, *, tls: ssl.SSLContext | None = None, headers: Mapping[str, str] | None = None) -> None:
        self._url = url
        self._tls = tls or (ssl.create_default_context() if url.is_tls else None)
        self._headers = {"host": f"{url.host}:{url.port}", "user-agent": "mii_serve-bench", **(headers or {})}
        self._idle: list[_Connection] = []

    @contextlib.asynccontextmanager
    async def request(self, method: str, path: str, body: bytes = b"", content_type: str = "") -> AsyncIterator[Response]:
        """Send a request; the body is read inside the block.

        Raises:
            HttpError: no connection, or it broke.
        """
        connection = None
        try:
            connection, response = await self._send(method, path, body, content_type)
            yield response
        except (OSError, h11.ProtocolError, asyncio.IncompleteReadError) as error:
            raise HttpError(f"{type(error).__name__}: {error}") from error
        finally:
            if connection is not None:
                self._give_back(connection)

    async def _send(self, method: str, path: str, body: bytes, content_type: str) -> tuple[_Connection, Response]:
        head = [*self._headers.items(), ("content-length", str(len(body)))]
        if content_type:
            head.append(("content-type", content_type))
        while True:
            is_kept = bool(self._idle)
            connection = self._idle.pop() if is_kept else await self._connect()
            protocol = connection.protocol
            try:
                request = h11.Request(method=method, target=self._url.path + path, headers=head)
                for event in (request, h11.Data(data=body), h11.EndOfMessage()):
                    connection.writer.write(protocol.send(event) or b"")
                await connection.writer.drain()
                answer = await _next_event(connection)
            except (OSError, h11.RemoteProtocolError):
                connection.writer.close()
                if is_kept:  # the server had closed it meanwhile; nothing was lost
                    continue
                raise
            except BaseException:
                connection.writer.close()
                raise
            while isinstance(answer, h11.InformationalResponse):
                answer = await _next_event(connection)
            if not isinstance(answer, h11.Response):
                connection.writer.close()
                raise HttpError("the server closed the connection without an answer")
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in answer.headers}
            return connection, Response(answer.status_code, headers, _chunks(connection))

    async def _connect(self) -> _Connection:
        reader, writer = await asyncio.open_connection(self._url.host, self._url.port, ssl=self._tls)
        return _Connection(reader, writer, h11.Connection(h11.CLIENT))

    def _give_back(self, connection: _Connection) -> None:
        protocol = connection.protocol
        if protocol.our_state is h11.DONE and protocol.their_state is h11.DONE:
            protocol.start_next_cycle()
            self._idle.append(connection)
        else:
            connection.writer.close()

    async def close(self) -> None:
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.writer.close()
            with contextlib.suppress(OSError):
                await connection.writer.wait_closed()


async def _next_event(connection: _Connection) -> object:
    while (event := connection.protocol.next_event()) is h11.NEED_DATA:
        connection.protocol.receive_data(await connection.reader.read(READ_BYTES))
    return event


async def _chunks(connection: _Connection) -> AsyncIterator[bytes]:
    while isinstance(event := await _next_event(connection), h11.Data):
        yield bytes(event.data)

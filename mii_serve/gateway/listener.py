"""The HTTP port's connections, bounded: at the bound, the one that has been idle longest is closed for a new one.

Idle are connections without a running request: between two requests, in the middle of a head, a body or a TLS handshake, with
an answer to a probe that is not taken in. Any number of them leaves the probes answered, because running requests are bounded
below the number of connections, so that some are idle.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Iterator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mii_serve.errors import UnavailableError
from mii_serve.gateway.hosts import refusal_for

logger = logging.getLogger(__name__)

CONNECTION = "mii_serve.connection"
"""Key of a scope: the file number of the connection that the request came by."""
NUM_IDLE = 16
"""Connections that are kept out of the reach of running requests."""
NUM_CLOSING = 16
"""Closed ones that may not be gone yet."""
LOG_EVERY_S = 60.0
PROBES = frozenset({"/livez", "/readyz", "/healthz", "/health", "/metrics", "/", "/v2/health/live", "/v2/health/ready"})
"""Answered however many requests run."""


class ConnectionPool:
    """Those that are open, by file number; the idle ones in the order in which they became so."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._open: dict[int, PooledSocket] = {}
        self._idle: OrderedDict[int, PooledSocket] = OrderedDict()
        self._closing: set[int] = set()
        self._logged_at = float("-inf")

    @property
    def is_full(self) -> bool:
        return len(self._open) - len(self._closing) >= self.most

    @property
    def num_closing(self) -> int:
        return len(self._closing)

    def add(self, connection: PooledSocket) -> None:
        self._open[connection.fileno()] = self._idle[connection.fileno()] = connection

    def remove(self, number: int) -> None:
        self._open.pop(number, None)
        self._idle.pop(number, None)
        self._closing.discard(number)

    @contextlib.contextmanager
    def running(self, number: int) -> Iterator[None]:
        """While the block runs, so does a request on this connection."""
        connection = self._open.get(number)
        self._idle.pop(number, None)
        try:
            yield
        finally:
            if connection is not None and self._open.get(number) is connection and number not in self._closing:
                self._idle[number] = connection

    def refresh(self, number: int) -> None:
        """A request was answered on this connection: it has been idle only since now."""
        if number in self._idle:
            self._idle.move_to_end(number)

    def close_idlest(self) -> bool:
        """Begin to close the one that has been idle longest; False where none is idle."""
        if not self._idle:
            return False
        number, connection = self._idle.popitem(last=False)
        self._closing.add(number)
        with contextlib.suppress(OSError):  # its caller has ended it already
            connection.shutdown(socket.SHUT_RDWR)  # its transport, of whatever kind, sees the end and closes it
        return True

    def log(self, message: str, *arguments: object) -> None:
        """A warning, at most one a minute: strangers decide how often there is a reason."""
        if time.monotonic() - self._logged_at >= LOG_EVERY_S:
            self._logged_at = time.monotonic()
            logger.warning(message, *arguments)


class PooledSocket(socket.socket):
    """One connection, which says when it is closed."""

    connections: ConnectionPool | None = None

    def close(self) -> None:
        if self.connections is not None and (number := self.fileno()) >= 0:
            self.connections.remove(number)
        super().close()


class BoundedListener(socket.socket):
    """A listening socket for asyncio, whose `accept` keeps to the bound and is not ended by a lack of files."""

    connections: ConnectionPool

    @classmethod
    def of(cls, listener: socket.socket, connections: ConnectionPool) -> BoundedListener:
        bounded = cls(fileno=listener.detach())
        bounded.connections = connections
        bounded._spare = os.open(os.devnull, os.O_RDONLY)
        return bounded

    def accept(self) -> tuple[socket.socket, object]:
        """As of any socket.

        Raises:
            BlockingIOError: no connection waits, or there is no room at the moment.
        """
        connections = self.connections
        has_room = True
        if connections.is_full:
            connections.log("all %d HTTP connections are in use: for a new one the idlest is closed", connections.most)
            has_room = connections.close_idlest()
        if connections.num_closing > NUM_CLOSING:
            raise BlockingIOError  # they are gone at one of the loop's next turns
        try:
            number, address = self._accept()  # type: ignore[attr-defined]  # what socket.accept is made from
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
                raise BlockingIOError from None
            raise
        accepted = PooledSocket(self.family, self.type, self.proto, fileno=number)
        if not has_room:
            accepted.close()
            raise BlockingIOError
        accepted.connections = connections
        connections.add(accepted)
        return accepted, address

    def close(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        super().close()

    _spare = -1

    def _turn_away(self) -> None:
        """There are no files left: with the spare one, accept what waits and close it, or the loop would see them for ever."""
        self.connections.log("no file is left for a new connection (ulimit -n)")
        self.connections.close_idlest()
        if self._spare < 0:
            return
        os.close(self._spare)
        self._spare = -1
        with contextlib.suppress(OSError):
            number, _ = self._accept()  # type: ignore[attr-defined]
            os.close(number)
        with contextlib.suppress(OSError):  # another thread was faster; the next time there may be one
            self._spare = os.open(os.devnull, os.O_RDONLY)


class ConcurrencyLimit:
    """ASGI middleware: so many requests may run at once; probes are answered beyond that.

    A request runs once its body is there: until then it costs nothing but its connection, which counts as idle.
    """

    def __init__(self, app: ASGIApp, connections: ConnectionPool) -> None:
        self._app = app
        self._connections = connections
        self._most = connections.most - NUM_IDLE
        self._num_running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_read_only = scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
        if scope["type"] != "http" or (is_read_only and scope["path"] in PROBES):
            await self._app(scope, receive, send)
            return
        with contextlib.ExitStack() as work:
            try:
                self._check_room()
            except UnavailableError as error:
                await refusal_for(scope, error)(scope, receive, send)
                return
            if is_read_only:
                work.enter_context(self._running(scope))
                await self._app(scope, receive, send)
            else:
                await self._app(scope, self._counted(scope, receive, work), send)

    def _counted(self, scope: Scope, receive: Receive, work: contextlib.ExitStack) -> Receive:
        """`receive`, at the end of whose body the request begins to run; raises `UnavailableError` where there is no room."""
        has_begun = False

        async def received() -> Message:
            nonlocal has_begun
            message = await receive()
            if not has_begun and message["type"] == "http.request" and not message.get("more_body", False):
                self._check_room()
                work.enter_context(self._running(scope))
                has_begun = True
            return message

        return received

    def _check_room(self) -> None:
        if self._num_running >= self._most:
            raise UnavailableError(f"{self._num_running} HTTP requests are in work, the most there may be")

    @contextlib.contextmanager
    def _running(self, scope: Scope) -> Iterator[None]:
        self._num_running += 1
        try:
            with self._connections.running(scope.get(CONNECTION, -1)):
                yield
        finally:
            self._num_running -= 1

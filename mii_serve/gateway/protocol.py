"""HTTP/1.1 connections, with two additions to uvicorn's protocol.

`BoundedProtocol` has a bound on what uvicorn leaves open: a head that never ends, or never begins, or is too long, and an
answer that is never taken in.

`HttpProtocol` answers a caller who has closed only their half of the connection. A caller who has left looks the same until
something is sent to them, so something is sent: `100 Continue`, which clients of HTTP/1.1 pass over wherever it comes before
the answer. If the caller has left, the second of these cannot be sent, and the request is cancelled as ever. HTTP/1.0 has no
such answer, TLS no half-closed connection, and a browser's tab is closed in the middle of a stream, not before it: there, the
end of what a caller sends means that the caller has left.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from mii_serve.gateway.listener import CONNECTION, ConnectionPool

HEAD_TIMEOUT_S = 15.0
"""A connection that is seen waiting for the same head twice, so far apart, is closed."""

UNREAD_LOOKS = 4
"""A connection whose caller has taken in nothing between so many looks and the one before is cut."""

MAX_HEAD_BYTES = 64 * 1024
"""Of a request's first line and headers together."""

PROBES_S = (0.0, 0.02, 0.3, 2.0)
"""After the caller's end. No more than these four: Go's client takes in five answers of this kind."""


class _HeadReader(h11.Connection):
    """h11's own bound is looked at only while a head has not all come, and what one read brings may be four times as much."""

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request) and _num_bytes(event) > MAX_HEAD_BYTES:
            raise h11.RemoteProtocolError("the head is too long", error_status_hint=431)
        return event


def _num_bytes(head: h11.Request) -> int:
    """As on the wire, but for the version and spaces that mean nothing."""
    return len(head.method) + len(head.target) + sum(len(name) + len(value) + len(": \r\n") for name, value in head.headers)


class BoundedProtocol(H11Protocol):
    _looking: asyncio.TimerHandle | None = None
    _head_after: RequestResponseCycle | None = None
    _was_waiting = False
    _number = -1
    _unsent = 0
    _num_unread_looks = 0

    def __init__(self, connections: ConnectionPool, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.conn = _HeadReader(h11.SERVER, MAX_HEAD_BYTES)
        self._connections = connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._number = transport.get_extra_info("socket").fileno()
        self._look_again()

    def handle_events(self) -> None:
        super().handle_events()
        if self.scope is not None:
            cast(dict[str, Any], self.scope)[CONNECTION] = self._number

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._connections.refresh(self._number)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._looking is not None:
            self._looking.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self._num_unread_looks = self._num_unread_looks + 1 if 0 < self._unsent <= unsent else 0
        self._unsent = unsent
        if self._num_unread_looks >= UNREAD_LOOKS:
            self.transport.abort()  # to close it would be to wait for what is unsent
        # An idle connection between two requests is uvicorn's to close, in its own time; a head that has begun is ours.
        is_idle = self.timeout_keep_alive_task is not None and not self.conn.trailing_data[0]
        is_waiting = self.cycle is None or (self.cycle.response_complete and not is_idle)
        if is_waiting and self._was_waiting and self.cycle is self._head_after:
            self.transport.close()
        self._was_waiting, self._head_after = is_waiting, self.cycle
        self._look_again()

    def _look_again(self) -> None:
        self._looking = self.loop.call_later(HEAD_TIMEOUT_S, self._look)


class HttpProtocol(BoundedProtocol):
    _probes: tuple[asyncio.TimerHandle, ...] = ()
    _has_ended = False

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether to keep our half open."""
        if self._has_ended:
            return not self.cycle.response_complete
        if not self._may_listen():
            return False
        self._has_ended = True
        self._probes = tuple(self.loop.call_later(after_s, self._probe) for after_s in PROBES_S)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        for probe in self._probes:
            probe.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._has_ended and self.cycle.response_complete and not self.transport.is_closing():
            self.transport.close()  # what was asked before the end is answered, and no more will come

    def _may_listen(self) -> bool:
        """Whether a whole request has come, and nothing of its answer has been sent."""
        cycle = self.cycle
        if cycle is None or cycle.more_body or cycle.response_started or self.scheme == "https":
            return False
        return bool(cycle.scope["http_version"] == "1.1")

    def _probe(self) -> None:
        if self.transport.is_closing() or self.cycle.response_started:
            return
        self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[], reason="Continue")))

"""A caller who sends no more may still listen: their half of the connection is closed, ours is not, and they get their answer.

A caller who has left looks the same until something is sent to them. So something is sent: `100 Continue`, which clients of
HTTP/1.1 pass over wherever it comes before the answer. To one who has left the second of these cannot be sent any more, and the
request is cancelled as ever. HTTP/1.0 has no such answer, TLS no half-closed connection, and a browser's tab is closed in the
middle of a stream, not before it: there, the end of what a caller sends is a caller who has left.
"""

from __future__ import annotations

import asyncio

import h11

from mii_serve.gateway.connections import BoundedConnection

PROBES_S = (0.0, 0.02, 0.3, 2.0)
"""After the caller's end. No more than these four: Go's client takes in five answers of this kind."""


class ListeningConnection(BoundedConnection):
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
        """Whether the caller has asked for something, all of it, and has been told nothing yet."""
        cycle = self.cycle
        if cycle is None or cycle.more_body or cycle.response_started or self.scheme == "https":
            return False
        return bool(cycle.scope["http_version"] == "1.1")

    def _probe(self) -> None:
        if self.transport.is_closing() or self.cycle.response_started:
            return
        self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[], reason="Continue")))

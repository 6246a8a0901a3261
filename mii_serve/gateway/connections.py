"""HTTP/1.1 connections with a bound on what uvicorn leaves open: a head that never ends, or never begins."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

HEAD_TIMEOUT_S = 15.0
"""A connection that is seen waiting for the same head twice, so far apart, is closed."""


class BoundedConnection(H11Protocol):
    _looking: asyncio.TimerHandle | None = None
    _head_after: RequestResponseCycle | None = None
    _was_waiting = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look_again()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._looking is not None:
            self._looking.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        # An idle connection between two requests is uvicorn's to close, in its own time; a head that has begun is ours.
        is_idle = self.timeout_keep_alive_task is not None and not self.conn.trailing_data[0]
        is_waiting = self.cycle is None or (self.cycle.response_complete and not is_idle)
        if is_waiting and self._was_waiting and self.cycle is self._head_after:
            self.transport.close()
            return
        self._was_waiting, self._head_after = is_waiting, self.cycle
        self._look_again()

    def _look_again(self) -> None:
        self._looking = self.loop.call_later(HEAD_TIMEOUT_S, self._look)

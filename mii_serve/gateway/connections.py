"""HTTP/1.1 connections with a bound on what uvicorn leaves open: a head that never ends, or never begins."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from mii_serve.gateway.listening import Connections

HEAD_TIMEOUT_S = 15.0
"""A connection that is seen waiting for the same head twice, so far apart, is closed."""


class BoundedConnection(H11Protocol):
    _looking: asyncio.TimerHandle | None = None
    _head_after: RequestResponseCycle | None = None
    _was_waiting = False
    _number = -1

    def __init__(self, connections: Connections, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._connections = connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._number = transport.get_extra_info("socket").fileno()
        self._look_again()

    def handle_events(self) -> None:
        super().handle_events()
        self._connections.mark(self._number, is_idle=self._is_waiting)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._connections.mark(self._number, is_idle=self._is_waiting)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._looking is not None:
            self._looking.cancel()
        super().connection_lost(exc)

    @property
    def _is_waiting(self) -> bool:
        return self.cycle is None or bool(self.cycle.response_complete)

    def _look(self) -> None:
        is_waiting = self._is_waiting
        if is_waiting and self._was_waiting and self.cycle is self._head_after:
            self.transport.close()
            return
        self._was_waiting, self._head_after = is_waiting, self.cycle
        self._look_again()

    def _look_again(self) -> None:
        self._looking = self.loop.call_later(HEAD_TIMEOUT_S, self._look)

"""A server of the tests in a thread of its own, for clients in other processes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

from patience import PATIENCE_S

T = TypeVar("T")


@contextlib.contextmanager
def in_a_thread(serving: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """What `serving` opens, in an event loop of its own."""
    loop, started, stopping = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    opened: list[T] = []

    async def serve() -> None:
        async with serving as served:
            opened.append(served)
            started.set()
            await stopping.wait()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        finally:
            loop.close()
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait(PATIENCE_S)
    try:
        yield opened[0]
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join(PATIENCE_S)

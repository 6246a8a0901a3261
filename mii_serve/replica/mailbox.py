"""Events on their way to one reader, who may be slower than they come."""

from __future__ import annotations

import asyncio
from collections import deque

from mii_serve.types import Event, Preview, Queued, Step

_Superseded = Queued | Step | Preview


class Mailbox:
    """A queue of the events of one request; an exception is raised in its turn.

    Of positions in the queue, steps and previews that have not been read, only the latest of each image is kept.
    """

    def __init__(self) -> None:
        self._entries: deque[Event | Exception] = deque()
        self._arrived = asyncio.Event()

    def put(self, entry: Event | Exception) -> None:
        if isinstance(entry, _Superseded):
            for old in [old for old in self._entries if _is_superseded(old, entry)]:
                self._entries.remove(old)
        self._entries.append(entry)
        self._arrived.set()

    async def get(self) -> Event:
        """The next event, awaited if there is none.

        Raises:
            Exception: one that was put in.
        """
        while not self._entries:
            self._arrived.clear()
            await self._arrived.wait()
        entry = self._entries.popleft()
        if isinstance(entry, Exception):
            raise entry
        return entry


def _is_superseded(old: Event | Exception, new: _Superseded) -> bool:
    return type(old) is type(new) and getattr(old, "image_index", None) == getattr(new, "image_index", None)

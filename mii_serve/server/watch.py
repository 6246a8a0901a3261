"""Notices a replica that lives but does not work."""

from __future__ import annotations

import asyncio
import time

from mii_serve.server.replica_client import ReplicaAddress, ReplicaConnection
from mii_serve.types import Activity

LOOKS_PER_BOUND = 10
LONGEST_PAUSE_S = 5.0


class Progress:
    """How long a replica has made none: samples are in work, and no turn is completed."""

    def __init__(self) -> None:
        self._last = -1
        self._moved_at = time.monotonic()

    def note(self, activity: Activity) -> None:
        """What it says now."""
        if not activity.num_running or activity.num_turns + activity.num_images != self._last:
            self._moved_at, self._last = time.monotonic(), activity.num_turns + activity.num_images

    @property
    def stuck_s(self) -> float:
        return time.monotonic() - self._moved_at


async def until_hung(address: ReplicaAddress, bound_s: float) -> str:
    """Watch the replica at this address; return, with the reason, once it has made no progress for `bound_s`.

    No progress is: samples are in work and no turn is completed, or it does not even answer. A replica that is gone is not
    hung; the supervisor notices that by itself.
    """
    pause_s = min(LONGEST_PAUSE_S, bound_s / LOOKS_PER_BOUND)
    progress = Progress()
    connection = ReplicaConnection(address)
    try:
        while True:
            await asyncio.sleep(pause_s)
            reason = "it does not answer"
            if (info := await connection.info(pause_s)) is not None:
                progress.note(info.activity)
                reason = f"{info.activity.num_running} images are in work and no step was completed"
            if progress.stuck_s > bound_s:
                return f"{reason} for {bound_s:g} s"
    finally:
        await connection.close()

"""Notices a replica that lives but does not work."""

from __future__ import annotations

import asyncio
import time

from mii_serve.server.replica_client import ReplicaAddress, ReplicaConnection

LOOKS_PER_BOUND = 10
LONGEST_PAUSE_S = 5.0


async def until_hung(address: ReplicaAddress, bound_s: float) -> str:
    """Watch the replica at this address; return, with the reason, once it has made no progress for `bound_s`.

    No progress is: samples are in work and no turn is completed, or it does not even answer. A replica that is gone is not
    hung; the supervisor notices that by itself.
    """
    pause_s = min(LONGEST_PAUSE_S, bound_s / LOOKS_PER_BOUND)
    last_moved_at, last_turns = time.monotonic(), -1
    connection = ReplicaConnection(address)
    try:
        while True:
            await asyncio.sleep(pause_s)
            reason = "it does not answer"
            if (info := await connection.info(pause_s)) is not None:
                activity = info.activity
                if not activity.num_running or activity.num_turns + activity.num_images != last_turns:
                    last_moved_at, last_turns = time.monotonic(), activity.num_turns + activity.num_images
                reason = f"{activity.num_running} images are in work and no step was completed"
            if time.monotonic() - last_moved_at > bound_s:
                return f"{reason} for {bound_s:g} s"
    finally:
        await connection.close()

"""Notices a replica that lives but does not work."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc

from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationStub
from mii_serve.server.link import REPLICA_CHANNEL_OPTIONS

LOOKS_PER_BOUND = 10
LONGEST_PAUSE_S = 5.0


async def until_hung(socket: Path, bound_s: float) -> str:
    """Watch the replica behind this socket; return, with the reason, once it has got nowhere for `bound_s`.

    Nowhere is: samples are in work and no turn is completed, or it does not even answer. A replica that is gone is not hung;
    somebody else notices that.
    """
    pause_s = min(LONGEST_PAUSE_S, bound_s / LOOKS_PER_BOUND)
    last_moved_at, last_turns = time.monotonic(), -1
    async with grpc.aio.insecure_channel(f"unix:{socket}", options=REPLICA_CHANNEL_OPTIONS) as channel:
        stub = ImageGenerationStub(channel)
        while True:
            await asyncio.sleep(pause_s)
            reason = "it does not answer"
            try:
                info = await stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=pause_s)
                activity = info.activity
                if not activity.num_running or activity.num_turns + activity.num_images != last_turns:
                    last_moved_at, last_turns = time.monotonic(), activity.num_turns + activity.num_images
                reason = f"{activity.num_running} images are in work and no step was completed"
            except grpc.aio.AioRpcError:
                pass
            if time.monotonic() - last_moved_at > bound_s:
                return f"{reason} for {bound_s:g} s"

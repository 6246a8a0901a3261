"""A whole server in this process: front, replica service and loop are the real ones, only the engine is a fake."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from fake_engine import FakeEngine
from patience import PATIENCE_S

from mii_serve.errors import EngineError
from mii_serve.proto.codec import CHANNEL_OPTIONS
from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationStub
from mii_serve.provenance import Provenance
from mii_serve.replica.loop import ReplicaLoop
from mii_serve.replica.service import ListenOn, replica_server
from mii_serve.safety.moderation import Moderator
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.front import GrpcFront
from mii_serve.server.keys import KeyRing
from mii_serve.server.replica_client import ReplicaAddress
from mii_serve.server.router import Router
from mii_serve.server.tls import Tls


@dataclass
class RunningServer:
    engine: FakeEngine
    loop: ReplicaLoop
    dispatcher: Dispatcher
    front: GrpcFront
    target: str
    channel: grpc.aio.Channel
    replica_server: grpc.aio.Server
    turns: asyncio.Task[None] = field(repr=False)

    @property
    def stub(self):
        return ImageGenerationStub(self.channel)

    async def until(self, condition) -> None:
        """Wait, within a bound, for something the loop is about to do."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - there is no event for every condition a test may have
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running_server(
    folder: Path,
    engine: FakeEngine,
    *,
    max_waiting_samples: int = 8,
    keys: KeyRing | None = None,
    tls: Tls | None = None,
    moderator: Moderator | None = None,
    on_terminate: Callable[[], None] | None = None,
    max_connection_age_s: float | None = None,
    provenance: Provenance | None = None,
) -> AsyncIterator[RunningServer]:
    engine_thread = ThreadPoolExecutor(1)
    loop = ReplicaLoop(engine, engine_thread, max_waiting_samples=max_waiting_samples, provenance=provenance)
    turns = asyncio.create_task(loop.run())
    socket = folder / "replica.sock"
    replica, _ = replica_server(loop, "test", ListenOn.socket(socket))
    await replica.start()
    dispatcher = Dispatcher(Router(patience_s=1.0), moderator=moderator, provenance=provenance)
    front = GrpcFront(dispatcher, keys=keys, tls=tls, on_terminate=on_terminate, max_connection_age_s=max_connection_age_s)
    target = f"127.0.0.1:{await front.listen('127.0.0.1', 0)}"
    await dispatcher.attach(ReplicaAddress.socket(socket))
    await front.set_serving(True)
    channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
    try:
        yield RunningServer(engine, loop, dispatcher, front, target, channel, replica, turns)
    finally:
        engine.gate.set()
        await channel.close()
        await front.stop(0)
        await dispatcher.detach()
        await replica.stop(0)
        turns.cancel()
        with contextlib.suppress(asyncio.CancelledError, EngineError):
            await turns
        engine_thread.shutdown()


class Turnstile:
    """A gate for an engine that lets a number of turns pass."""

    def __init__(self) -> None:
        self._passes = threading.Semaphore(0)
        self.wait = self._passes.acquire

    def let(self, turns: int) -> None:
        self._passes.release(turns)

    def set(self) -> None:
        self.let(10_000)

"""Several replicas in this process behind one front, which tests may kill and start again. Engines are fakes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import random
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from fake_engine import FakeEngine
from patience import PATIENCE_S
from PIL import Image

from mii_serve.errors import EngineError
from mii_serve.proto.codec import CHANNEL_OPTIONS
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationStub
from mii_serve.replica.loop import ReplicaLoop
from mii_serve.replica.service import ListenOn, replica_server
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.front import GrpcFront
from mii_serve.server.replica_client import Loss, ReplicaAddress
from mii_serve.server.router import Router
from mii_serve.types import SampleProgress, StepPlan

KILLED = Loss(reason="killed by signal 9", is_crash=False)
CRASHED = Loss(reason="killed by signal 11", is_crash=True)


POISON = "a poison"
SUDDEN_POISON = "a sudden poison"
"""It crashes a replica before that could say that it had begun with it."""


class PoisonableEngine(FakeEngine):
    """Calls `on_poison` in a turn that a prompt named so joins, and makes no step after that."""

    on_poison: Callable[[], None]

    def run(self, plan: StepPlan) -> tuple[SampleProgress, ...]:
        self.gate.wait()
        prompts = {sample.params.prompt for sample in plan.joins}
        if prompts & {POISON, SUDDEN_POISON}:
            if SUDDEN_POISON not in prompts:
                time.sleep(0.02)  # a crash takes long enough for what was said before to arrive
            self.gate.clear()
            self.on_poison()
        return super().run(plan)


class Replica:
    """A replica in this process, which can die like one in its own."""

    def __init__(self, socket: Path, *, max_slots: int, on_poison: Callable[[], None]) -> None:
        self.socket = socket
        self.engine = PoisonableEngine(max_slots=max_slots)
        self.engine.on_poison = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, on_poison)
        self._thread = ThreadPoolExecutor(1)
        self.loop = ReplicaLoop(self.engine, self._thread, max_waiting_samples=4096)
        self._turns = asyncio.create_task(self.loop.run())
        self._server, _ = replica_server(self.loop, "test", ListenOn.socket(socket))

    async def start(self) -> None:
        await self._server.start()

    async def die(self) -> None:
        await self._server.stop(0)
        self._turns.cancel()
        with contextlib.suppress(asyncio.CancelledError, EngineError):
            await self._turns
        last = asyncio.get_running_loop().run_in_executor(self._thread, lambda: None)
        while not last.done():  # a poison that begins just now closes the gate once more
            self.engine.gate.set()
            await asyncio.sleep(0.005)
        self._thread.shutdown()
        self.socket.unlink(missing_ok=True)


class Deployment:
    """A front with replicas that a test may kill and start again, as the supervisor would tell of it."""

    def __init__(self, folder: Path, count: int, max_slots: int = 4, patience_s: float = PATIENCE_S) -> None:
        self._folder = folder
        self._max_slots = max_slots
        self._lives = 0
        self._crashing: set[asyncio.Task[None]] = set()
        self.num_crashes = 0
        self.router = Router(count, patience_s=patience_s)
        self.dispatcher = Dispatcher(self.router)
        self.front = GrpcFront(self.dispatcher)
        self.replicas: dict[int, Replica] = {}

    async def start(self, index: int, *, is_held: bool = False) -> None:
        """With `is_held` it makes no step before `release`."""
        self._lives += 1
        replica = self.replicas[index] = Replica(
            self._folder / f"{self._lives}.sock",
            max_slots=self._max_slots,
            on_poison=lambda: self._crashing.add(asyncio.create_task(self._crash(index, replica))),
        )
        if is_held:
            self.replicas[index].engine.gate.clear()
        await self.replicas[index].start()
        await self.dispatcher.attach(ReplicaAddress.socket(self.replicas[index].socket), index)

    async def _crash(self, index: int, replica: Replica) -> None:
        if self.replicas.get(index) is replica:
            self.num_crashes += 1
            await self.lose(index, CRASHED)
            await self.start(index)

    async def lose(self, index: int, loss: Loss) -> None:
        await self.replicas.pop(index).die()
        await self.dispatcher.detach(index, loss)

    async def until(self, condition) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - there is no event for every condition a test may have
                await asyncio.sleep(0.005)

    def images_on(self) -> dict[int, int]:
        """In work or in line."""
        activities = {index: replica.loop.activity() for index, replica in self.replicas.items()}
        return {index: activity.num_running + activity.num_waiting for index, activity in activities.items()}

    async def settled(self) -> None:
        """Wait for replicas that are just crashing to be back."""
        while self._crashing:
            await self._crashing.pop()

    def hold(self) -> None:
        for replica in self.replicas.values():
            replica.engine.gate.clear()

    def release(self) -> None:
        for replica in self.replicas.values():
            replica.engine.gate.set()


@contextlib.asynccontextmanager
async def deployment_of(
    folder: Path, count: int, max_slots: int = 4, patience_s: float = PATIENCE_S
) -> AsyncIterator[Deployment]:
    deployment = Deployment(folder, count, max_slots, patience_s)
    try:
        for index in range(count):
            await deployment.start(index)
        target = f"127.0.0.1:{await deployment.front.listen('127.0.0.1', 0)}"
        async with grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:
            deployment.stub = ImageGenerationStub(channel)
            yield deployment
    finally:  # an engine thread that is held would outlive the test, and the run
        deployment.release()
        await deployment.front.stop(0)
        await deployment.settled()
        for index in list(deployment.replicas):
            await deployment.lose(index, KILLED)


def request(**fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"prompt": "a red circle", "seed": 5, **fields})


async def events_of(call) -> list[pb.GenerateEvent]:
    return [event async for event in call]


def kinds(events: list[pb.GenerateEvent]) -> list[str]:
    return [event.WhichOneof("event") for event in events]


def color(image: pb.GeneratedImage) -> tuple[int, ...]:
    return Image.open(io.BytesIO(image.data)).getpixel((0, 0))


def expected_color(seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).randbytes(3))

"""Replicas in memory, as the router sees them: a test says what each of them answers, and when it is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

from mii_serve.errors import DeadlineExceededError, MiiServeError
from mii_serve.replica.mailbox import Mailbox
from mii_serve.server.call import CallContext
from mii_serve.server.replica_client import Loss, Order, ReplicaLostError
from mii_serve.server.router import Router, Work
from mii_serve.types import (
    Done,
    EffectiveParameters,
    EngineDescription,
    Event,
    GenerationParams,
    ImageFormat,
    ImageReady,
    OutputOptions,
    Queued,
    ResolvedRequest,
    SchedulerDescription,
    Started,
    Step,
)

KILLED = Loss(reason="killed by signal 9", is_crash=False)
CRASHED = Loss(reason="killed by signal 11", is_crash=True)

PARAMS = GenerationParams(
    prompt="a red circle",
    negative_prompt="",
    height=64,
    width=64,
    num_inference_steps=4,
    guidance_scale=7.5,
    num_images_per_prompt=1,
    scheduler="pndm",
    seed=5,
)
ENGINE = EngineDescription(engine="fake", dtype="fp32", device="cpu", model="fake", model_revision="0", has_safety_checker=True)
SCHEDULER = SchedulerDescription(class_name="PNDMScheduler", options={}, is_compiled=True)


def resolved(output: OutputOptions | None = None, **params: object) -> ResolvedRequest:
    return ResolvedRequest(params=replace(PARAMS, **params), output=output or OutputOptions(format=ImageFormat.RAW_RGB))


def call_context(timeout_s: float | None = None, **fields: object) -> CallContext:
    """Of a call that arrives now."""
    deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
    return CallContext(**{"request_id": "r", "client": "c", "deadline": deadline, **fields})


def work_of(*, timeout_s: float | None = None, has_steps: bool = True, **params: object) -> Work:
    return Work(request=resolved(**params), call=call_context(timeout_s), has_steps=has_steps)


def image_of(params: GenerationParams, index: int) -> ImageReady:
    """The seed says which image it is."""
    seed = params.seed_of(index)
    return ImageReady(
        image_index=index,
        encoded=f"{params.prompt} {seed}".encode(),
        format=ImageFormat.RAW_RGB,
        height=params.height,
        width=params.width,
        seed=seed,
    )


def done_of(params: GenerationParams) -> Done:
    return Done(parameters=EffectiveParameters.of(params, ENGINE, SCHEDULER), queued_s=0.0, total_s=0.0)


class FakeGeneration:
    """One order on a fake replica."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.mailbox = Mailbox()

    @property
    def params(self) -> GenerationParams:
        return self.order.request.params

    def put(self, entry: Event | Exception) -> None:
        self.mailbox.put(entry)

    def start(self, index: int = 0) -> None:
        self.put(Started(image_index=index))

    def step(self, index: int, step: int) -> None:
        """As the connection hears of it."""
        num_steps = self.params.num_inference_steps
        self.order.on_step(index, step, num_steps)
        if self.order.has_steps:
            self.put(Step(image_index=index, step=step, num_steps=num_steps, estimated_left_s=0.0))

    def image(self, index: int) -> None:
        self.put(image_of(self.params, index))

    def done(self) -> None:
        self.put(done_of(self.params))

    def finish(self) -> None:
        """All of it."""
        self.put(Queued(num_samples_ahead=0))
        for index in range(self.params.num_images_per_prompt):
            self.start(index)
            for step in range(1, self.params.num_inference_steps + 1):
                self.step(index, step)
            self.image(index)
        self.done()


class FakeConnection:
    """What the router uses of a `ReplicaConnection`."""

    def __init__(self) -> None:
        self.lost: asyncio.Future[Loss] = asyncio.get_running_loop().create_future()
        self.is_broken = False
        self.work = self.batch_work = 0
        self.num_running = 0
        self.num_running_at_break: int | None = None
        self.is_isolated = False
        self.running: list[FakeGeneration] = []
        self.orders: list[Order] = []

    async def generate(self, order: Order) -> AsyncGenerator[Event, None]:
        generation = FakeGeneration(order)
        self.running.append(generation)
        self.orders.append(order)
        if self.is_broken:
            generation.put(ReplicaLostError(self))
        timer = None
        if order.left_s is not None:
            late = DeadlineExceededError("the pictures were not ready in time")
            timer = asyncio.get_running_loop().call_later(order.left_s, generation.put, late)
        event: Event | None = None
        try:
            while not isinstance(event, Done):
                event = await generation.mailbox.get()
                yield event
        finally:
            self.running.remove(generation)
            if timer is not None:
                timer.cancel()

    def note_break(self) -> None:
        self.is_broken = True
        if self.num_running_at_break is None:
            self.num_running_at_break = self.num_running

    def break_stream(self) -> None:
        """It is not known yet why."""
        self.note_break()
        for generation in self.running:
            generation.put(ReplicaLostError(self))


class FakeReplica:
    """What the router uses of a `ReplicaClient`; it can be lost and started again."""

    num_restarts = 0

    def __init__(self, router: Router, index: int) -> None:
        self.index = index
        self._router = router
        self._life: FakeConnection | None = None

    @property
    def life(self) -> FakeConnection:
        """Its connection, broken or not."""
        assert self._life is not None
        return self._life

    @property
    def connection(self) -> FakeConnection | None:
        return None if self._life is None or self._life.is_broken else self._life

    @property
    def is_up(self) -> bool:
        return self.connection is not None

    @property
    def running(self) -> list[FakeGeneration]:
        return [] if self._life is None else self._life.running

    def start(self) -> None:
        self._life = FakeConnection()
        self._router.serve_waiting()

    def lose(self, loss: Loss = KILLED) -> None:
        life, self._life = self.life, None
        life.break_stream()
        life.lost.set_result(loss)
        self._router.serve_waiting()


def router_of(num_replicas: int, *, patience_s: float = 120.0) -> tuple[Router, list[FakeReplica]]:
    router = Router(num_replicas, patience_s=patience_s)
    replicas = [FakeReplica(router, index) for index in range(num_replicas)]
    router.replicas[:] = replicas
    for replica in replicas:
        replica.start()
    return router, replicas


async def settle() -> None:
    """Let everything happen that needs no time."""
    for _ in range(50):
        await asyncio.sleep(0)


class Caller:
    """A reader of a request's events."""

    def __init__(self, router: Router, work: Work) -> None:
        self.work = work
        self.events: list[Event] = []
        self.error: BaseException | None = None
        self._stream = router.events(work)
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for event in self._stream:
                self.events.append(event)
        except MiiServeError as error:
            self.error = error
        finally:
            await self._stream.aclose()

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def images(self) -> list[ImageReady]:
        return sorted((event for event in self.events if isinstance(event, ImageReady)), key=lambda image: image.image_index)

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def assert_at_rest(router: Router, replicas: list[FakeReplica]) -> None:
    assert not router._waiting and not router._suspects
    for replica in replicas:
        assert not replica.running
        if replica._life is not None:
            life = replica.life
            assert (life.work, life.num_running, life.is_isolated) == (0, 0, False)


def assert_whole(caller: Caller) -> None:
    """Each image once, the right one, and `Done` last."""
    params = caller.work.params
    assert caller.error is None
    assert caller.images == [image_of(params, index) for index in range(params.num_images_per_prompt)]
    assert [isinstance(event, Done) for event in caller.events] == [False] * (len(caller.events) - 1) + [True]
    [done] = caller.of(Done)
    assert (done.parameters.seed, done.parameters.num_images_per_prompt) == (params.seed, params.num_images_per_prompt)


def counts(replicas: list[FakeReplica]) -> list[int]:
    """Images ordered of each replica and not finished."""
    return [sum(one.params.num_images_per_prompt for one in replica.running) for replica in replicas]


def finish_all(replicas: list[FakeReplica]) -> None:
    for replica in replicas:
        for generation in list(replica.running):
            generation.finish()

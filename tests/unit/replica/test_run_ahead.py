"""The loop keeps one turn ahead of its device, neither more nor less. Everything is counted in turns."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from queued_device import TURN_S, QueuedEngine

from mii_serve.engine.turns import Turns
from mii_serve.replica.loop import ReplicaLoop
from mii_serve.types import (
    Done,
    Event,
    OutputOptions,
    Priority,
    RequestedParams,
    ResolvedRequest,
    Sample,
    SampleId,
    Step,
    StepPlan,
)


class Events:
    def __init__(self) -> None:
        self.all: list[Event | Exception] = []

    def put(self, entry: Event | Exception) -> None:
        self.all.append(entry)

    @property
    def num_steps(self) -> int:
        return sum(isinstance(event, Step) for event in self.all)

    @property
    def is_over(self) -> bool:
        return any(isinstance(event, Done | Exception) for event in self.all)


class Replica:
    """A loop over a device whose turns the test ends one by one."""

    def __init__(self, thread: ThreadPoolExecutor, max_slots: int) -> None:
        self.engine = QueuedEngine(max_slots=max_slots)
        self.loop = ReplicaLoop(self.engine, thread, max_waiting_samples=100)
        self.turns = asyncio.create_task(self.loop.run())

    async def submit(self, name: str, num_steps: int, priority: Priority = Priority.NORMAL) -> Events:
        events = Events()
        asked = RequestedParams(prompt="a", num_inference_steps=num_steps, seed=0)
        params = self.engine.capabilities.resolve(asked, fallback_seed=0)
        await self.loop.submit(name, ResolvedRequest(params=params, output=OutputOptions(), priority=priority), events)
        return events

    async def end_turn(self) -> None:
        """Let the turn that runs end, and wait until the host waits for the next one, or has nothing to do."""
        await asyncio.to_thread(self.engine.end_turn)
        await self.until(lambda: self.engine.is_waited_for.is_set() or self.loop._turns.is_idle)

    async def until(self, condition) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - the condition is of another thread
                await asyncio.sleep(0.001)

    def turn_of_first_step(self, name: str) -> int | None:
        """Counted from 1."""
        turns = (turn for turn, plan in enumerate(self.engine.plans, 1) if SampleId(name, 0) in plan.steps)
        return next(turns, None)


@pytest.fixture
async def replica():
    with ThreadPoolExecutor(1) as thread:
        made = Replica(thread, max_slots=4)
        yield made
        made.turns.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await made.turns
        while made.engine.queue:
            made.engine.queue.popleft().has_ended.set()


async def test_one_turn_runs_and_one_is_prepared(replica):
    await replica.submit("long", 40)
    await replica.until(replica.engine.is_waited_for.is_set)
    for turn in range(1, 11):
        assert len(replica.engine.queue) == 2, "the device has its next turn when it ends this one"
        assert replica.engine.num_launched == turn + 1
        await replica.end_turn()
    assert replica.engine.most_in_queue == 2, "and no more"


async def test_step_events_tell_what_the_device_has_done(replica):
    events = await replica.submit("long", 40)
    await replica.until(replica.engine.is_waited_for.is_set)
    assert events.num_steps == 0, "two turns are launched, and none is done"
    for turn in range(1, 5):
        await replica.end_turn()
        assert events.num_steps == turn


async def test_a_newcomer_is_in_the_first_turn_that_is_not_prepared_yet(replica):
    await replica.submit("long", 40)
    await replica.until(replica.engine.is_waited_for.is_set)
    for _ in range(4):
        await replica.end_turn()
    await replica.submit("newcomer", 4)  # turn 5 runs, and turn 6 is prepared
    for _ in range(3):
        await replica.end_turn()
    assert replica.turn_of_first_step("newcomer") == 7


async def test_who_leaves_makes_at_most_the_step_that_is_prepared(replica):
    await replica.submit("stays", 40)
    await replica.submit("leaves", 40)
    await replica.until(replica.engine.is_waited_for.is_set)
    for _ in range(4):
        await replica.end_turn()
    replica.loop.drop("leaves")  # turn 5 runs, and turn 6 is prepared
    for _ in range(3):
        await replica.end_turn()
    with_it = [turn for turn, plan in enumerate(replica.engine.plans, 1) if SampleId("leaves", 0) in plan.steps]
    assert with_it[-1] == 6
    assert SampleId("leaves", 0) in replica.engine.plans[6].leaves


async def test_batch_requests_give_way_from_the_first_turn_that_is_not_prepared_until_the_pictures_of_others_are_there(replica):
    await replica.submit("batch", 40, Priority.BATCH)
    await replica.until(replica.engine.is_waited_for.is_set)
    for _ in range(4):
        await replica.end_turn()
    other = await replica.submit("other", 2)  # turn 5 runs, and turn 6 is prepared
    for _ in range(5):
        await replica.end_turn()
    await replica.until(lambda: other.is_over)
    steps = [[sample_id.request_id.split()[0] for sample_id in plan.steps] for plan in replica.engine.plans]
    assert steps[4:10] == [["batch"], ["batch"], ["other"], ["other"], ["batch"], ["batch"]]
    assert replica.loop._scheduler.batch.num_restarted == 0


async def test_step_times_are_the_devices(replica):
    await replica.submit("long", 9)
    await replica.until(replica.engine.is_waited_for.is_set)
    for _ in range(3):
        await replica.end_turn()
    assert replica.loop._scheduler.remaining_s(SampleId("long", 0)) == pytest.approx(6 * TURN_S)


async def test_all_turns_end_when_there_is_no_more_to_do(replica):
    events = await replica.submit("short", 3)
    await replica.until(replica.engine.is_waited_for.is_set)
    while replica.engine.queue:
        await replica.end_turn()
    await replica.until(lambda: events.is_over)
    assert isinstance(events.all[-1], Done)
    assert replica.engine.num_launched == 3


async def test_a_sample_that_fails_ends_its_request_though_its_next_step_is_prepared(replica):
    events, other = await replica.submit("fails", 9), await replica.submit("goes on", 9)
    await replica.until(replica.engine.is_waited_for.is_set)
    await replica.end_turn()
    replica.engine.fail_sample_of("fails")
    while replica.engine.queue:
        await replica.end_turn()
    await replica.until(lambda: other.is_over)
    assert isinstance(events.all[-1], Exception)
    assert isinstance(other.all[-1], Done)


def test_an_engine_that_computes_in_its_own_thread_is_never_ahead():
    engine = FakeEngine(max_slots=1)
    turns = Turns(engine, on_decoded=lambda: None)
    params = engine.capabilities.resolve(RequestedParams(prompt="a"), fallback_seed=0)
    one = Sample(id=SampleId("r", 0), params=params)
    [result] = turns.step(StepPlan(joins=(one,), steps=(one.id,)))
    assert [progress.step for progress in result.progress] == [1]
    assert turns.is_idle

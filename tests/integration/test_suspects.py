"""Requests that crash replicas, among others that do not: only the guilty are refused. Engines are fakes."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest
from patience import PATIENCE_S
from replicas import (
    CRASHED,
    KILLED,
    POISON,
    SUDDEN_POISON,
    Deployment,
    color,
    deployment_of,
    events_of,
    expected_color,
    kinds,
    request,
)

from mii_serve.errors import PoisonedRequestError
from mii_serve.proto.status import decode_error

MAX_RESTARTS_OF_INNOCENTS = 2
"""Of one part: once in line for a replica that crashed, once on one. There are at most as many parts as replicas, three."""


def called(deployment: Deployment, timeout: float | None = None, **fields) -> asyncio.Task:
    return asyncio.create_task(events_of(deployment.stub.GenerateStream(request(**fields), timeout=timeout)))


def is_refused_as_poisoned(outcome: object) -> bool:
    if not isinstance(outcome, grpc.aio.AioRpcError):
        return False
    return isinstance(decode_error(outcome.code(), outcome.details(), outcome.trailing_metadata()), PoisonedRequestError)


def assert_made(events: object, fields: dict) -> None:
    assert isinstance(events, list), events
    images = sorted((event.image for event in events if event.HasField("image")), key=lambda image: image.index)
    seeds = range(fields["seed"], fields["seed"] + fields.get("num_images_per_prompt", 1))
    assert [color(image) for image in images] == [expected_color(seed) for seed in seeds]
    assert kinds(events).count("restarted") <= MAX_RESTARTS_OF_INNOCENTS * min(3, fields.get("num_images_per_prompt", 1))


async def assert_at_rest(deployment: Deployment) -> None:
    await deployment.settled()
    router = deployment.router
    await deployment.until(lambda: not router._waiting and not router._suspects)
    assert [(link.work, link.num_running) for link in router.replicas] == [(0, 0)] * len(router.replicas)
    assert not any(link.connection.is_isolated for link in router.replicas)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("poison", [POISON, SUDDEN_POISON])
async def test_of_eight_innocents_beside_a_poison_each_gets_its_picture(tmp_path, count, poison):
    async with deployment_of(tmp_path, count, max_slots=8) as deployment:
        deployment.hold()
        innocents = [{"seed": seed, "num_inference_steps": 20} for seed in range(8)]
        calls = [called(deployment, PATIENCE_S, **fields) for fields in innocents]
        guilty = called(deployment, PATIENCE_S, prompt=poison)
        await deployment.until(lambda: sum(deployment.images_on().values()) == 9)
        deployment.release()
        assert is_refused_as_poisoned((await asyncio.gather(guilty, return_exceptions=True))[0])
        for fields, events in zip(innocents, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            assert_made(events, fields)
        await assert_at_rest(deployment)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
async def test_however_requests_and_poisons_mix_only_the_poisons_are_refused(tmp_path, seed):
    """Several poisons, some repeated, some in many images; any number of replicas; callers that hang up in between."""
    chance = random.Random(seed)
    async with deployment_of(tmp_path, chance.randint(1, 3), max_slots=chance.choice([1, 2, 4, 8])) as deployment:
        deployment.hold()
        kinds_of_call = [POISON] * chance.randint(1, 3) + [SUDDEN_POISON] * chance.randint(0, 1)
        kinds_of_call += ["innocent"] * chance.randint(4, 10) + ["leaves"] * chance.randint(0, 3)
        chance.shuffle(kinds_of_call)
        calls: list[tuple[str, dict, asyncio.Task]] = []
        for number, kind in enumerate(kinds_of_call):
            fields = {
                "seed": number * 100,
                "num_inference_steps": chance.choice([4, 30, 100]),
                "num_images_per_prompt": chance.choice([1, 1, 2, 5]),
                "prompt": kind if kind in (POISON, SUDDEN_POISON) else f"{kind} {number}",
            }
            calls.append((kind, fields, called(deployment, PATIENCE_S, **fields)))
            if chance.random() < 0.3:
                deployment.release()
                await asyncio.sleep(chance.random() / 50)
        deployment.release()
        for kind, _, call in calls:
            if kind == "leaves":
                await asyncio.sleep(chance.random() / 50)
                call.cancel()
        async with asyncio.timeout(PATIENCE_S):
            outcomes = await asyncio.gather(*(call for _, _, call in calls), return_exceptions=True)
        for (kind, fields, _), outcome in zip(calls, outcomes, strict=True):
            if kind == "innocent":
                assert_made(outcome, fields)
            elif kind != "leaves":
                assert is_refused_as_poisoned(outcome), outcome
        await assert_at_rest(deployment)


async def crowd_after_a_crash(deployment: Deployment, num_calls: int, left_s: float | None = None) -> list[asyncio.Task]:
    """Calls that were in work on a replica when it crashed; every replica is back, and held.

    Nothing where the machine is so slow that a call's time ran out before.
    """
    started: set[int] = set()

    async def followed(seed: int) -> list:
        events = []
        async for event in deployment.stub.GenerateStream(request(seed=seed, num_inference_steps=500), timeout=left_s):
            events.append(event)
            if event.HasField("started"):
                started.add(seed)
        return events

    calls = [asyncio.create_task(followed(seed)) for seed in range(num_calls)]
    await deployment.until(lambda: len(started) == num_calls or any(call.done() for call in calls))
    if left_s is not None and any(call.done() for call in calls):
        await asyncio.gather(*calls, return_exceptions=True)
        return []
    deployment.hold()
    for index in list(deployment.replicas):
        await deployment.lose(index, CRASHED)
    for index in range(len(deployment.router.replicas)):
        await deployment.start(index, is_held=True)
    return calls


@pytest.mark.slow
async def test_suspects_are_made_one_at_a_time_on_a_replica_and_all_but_one_replica(tmp_path):
    async with deployment_of(tmp_path, 3) as deployment:
        calls = await crowd_after_a_crash(deployment, 6)
        await deployment.until(lambda: sorted(deployment.images_on().values()) == [0, 1, 1])
        other = called(deployment, seed=50)
        await deployment.until(lambda: deployment.images_on() == {0: 1, 1: 1, 2: 1})
        another = called(deployment, seed=51)
        await deployment.until(lambda: sorted(deployment.images_on().values()) == [1, 1, 2])
        deployment.release()
        for seed, events in zip([*range(6), 50, 51], await asyncio.gather(*calls, other, another), strict=True):
            assert_made(events, {"seed": seed})
        await assert_at_rest(deployment)


async def test_on_a_single_replica_others_wait_until_all_suspects_are_through(tmp_path):
    async with deployment_of(tmp_path, 1) as deployment:
        calls = await crowd_after_a_crash(deployment, 3)
        await deployment.until(lambda: deployment.images_on() == {0: 1})
        other = called(deployment, seed=50)
        await asyncio.sleep(0.1)
        assert deployment.images_on() == {0: 1}
        deployment.release()
        for seed, events in zip([*range(3), 50], await asyncio.gather(*calls, other), strict=True):
            assert_made(events, {"seed": seed})
        await assert_at_rest(deployment)


async def test_a_suspect_that_waits_ends_at_its_deadline(tmp_path):
    for left_s in (2.0, 10.0, 60.0):
        (folder := tmp_path / f"{left_s:g}").mkdir()
        async with deployment_of(folder, 1) as deployment:
            if not (calls := await crowd_after_a_crash(deployment, 3, left_s)):
                continue
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert outcome.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            deployment.release()
            assert_made(await called(deployment, seed=50), {"seed": 50})
            await assert_at_rest(deployment)
            return
    pytest.fail("in a minute, three calls were not even begun")


async def test_suspects_that_hang_up_make_room_for_the_next(tmp_path):
    async with deployment_of(tmp_path, 1) as deployment:
        calls = await crowd_after_a_crash(deployment, 4)
        await deployment.until(lambda: len(deployment.router._suspects) == 3)
        for call in calls[:3]:
            call.cancel()
        deployment.release()
        assert_made(await calls[3], {"seed": 3})
        await asyncio.gather(*calls, return_exceptions=True)
        await assert_at_rest(deployment)


async def test_a_poison_that_comes_again_is_made_alone_from_the_start(tmp_path):
    async with deployment_of(tmp_path, 1) as deployment:
        await asyncio.gather(called(deployment, prompt=POISON), return_exceptions=True)
        await deployment.settled()
        assert deployment.num_crashes == 2
        deployment.hold()
        innocent = called(deployment, seed=7)
        await deployment.until(lambda: sum(deployment.images_on().values()) == 1)
        guilty = called(deployment, prompt=POISON, seed=8, num_images_per_prompt=2)
        deployment.release()
        outcome, events = await asyncio.gather(guilty, innocent, return_exceptions=True)
        assert is_refused_as_poisoned(outcome)
        assert_made(events, {"seed": 7})
        assert "restarted" not in kinds(events) and deployment.num_crashes == 3


async def test_a_crowd_that_is_killed_once_stays_one_and_killed_twice_is_made_one_at_a_time(tmp_path):
    """The request that notices last that its replica is gone was not alone on it for that."""
    async with deployment_of(tmp_path, 1, max_slots=8) as deployment:
        deployment.hold()
        calls = [called(deployment, seed=seed) for seed in range(6)]
        await deployment.until(lambda: sum(deployment.images_on().values()) == 6)
        for num_images in (6, 1):
            await deployment.lose(0, KILLED)
            await deployment.start(0, is_held=True)
            await deployment.until(lambda num_images=num_images: sum(deployment.images_on().values()) == num_images)
        deployment.release()
        for seed, events in enumerate(await asyncio.gather(*calls)):
            assert_made(events, {"seed": seed})


async def test_a_request_is_parted_by_the_load_and_made_where_it_was_booked(tmp_path):
    """Two images of earlier requests on the first replica, one on the second: of five more it gets two, the other three."""
    async with deployment_of(tmp_path, 2) as deployment:
        deployment.hold()
        placed: dict[int, int] = {0: 2, 1: 1}
        calls = [called(deployment, seed=seed, num_inference_steps=10) for seed in range(3)]
        await deployment.until(lambda: deployment.images_on() == placed)
        parted = called(deployment, seed=50, num_images_per_prompt=5, num_inference_steps=10)
        await deployment.until(lambda: deployment.images_on() == {0: 4, 1: 4})
        deployment.release()
        assert_made(await parted, {"seed": 50, "num_images_per_prompt": 5})
        await asyncio.gather(*calls)


async def test_requests_that_arrive_together_see_each_others_work(tmp_path):
    async with deployment_of(tmp_path, 2, max_slots=8) as deployment:
        deployment.hold()
        calls = [called(deployment, seed=seed, num_images_per_prompt=count) for seed, count in ((0, 3), (10, 3), (20, 2))]
        await deployment.until(lambda: deployment.images_on() == {0: 4, 1: 4})
        deployment.release()
        await asyncio.gather(*calls)


async def test_a_replica_that_is_emptied_for_a_suspect_takes_others_again_when_that_one_hangs_up(tmp_path):
    async with deployment_of(tmp_path, 2) as deployment:
        started: set[int] = set()

        async def followed(seed: int) -> None:
            async for event in deployment.stub.GenerateStream(request(seed=seed, num_inference_steps=500)):
                if event.HasField("started"):
                    started.add(seed)

        suspect = asyncio.create_task(followed(0))
        await deployment.until(lambda: started == {0})
        running = asyncio.create_task(followed(1))
        await deployment.until(lambda: started == {0, 1})
        deployment.hold()
        await deployment.lose(0, CRASHED)  # the first one of two that have nothing to do
        await deployment.until(lambda: len(deployment.router._suspects) == 1)
        other = called(deployment, seed=50)
        await deployment.until(lambda: len(deployment.router._waiting) == 1)
        suspect.cancel()
        await deployment.until(lambda: sum(deployment.images_on().values()) == 2)
        deployment.release()
        assert_made(await other, {"seed": 50})
        await running

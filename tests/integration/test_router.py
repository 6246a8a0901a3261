"""Several replicas behind one front: who gets what, and what becomes of a lost replica's requests. Engines are fakes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from image_files import file_of, some
from patience import PATIENCE_S
from replicas import CRASHED, KILLED, Deployment, color, deployment_of, events_of, expected_color, kinds, request

from mii_serve.errors import PoisonedRequestError, QueueFullError
from mii_serve.proto.status import decode_error
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.server import replica_client, router
from mii_serve.types import InputImage


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployment_of(tmp_path, 3) as deployment:
        yield deployment


class TestWhoGetsWhat:
    async def test_work_goes_where_least_is_left(self, three):
        three.hold()
        long = asyncio.create_task(events_of(three.stub.GenerateStream(request(num_inference_steps=100))))
        await three.until(lambda: sum(three.images_on().values()) == 1)
        short = [asyncio.create_task(events_of(three.stub.GenerateStream(request(num_inference_steps=10)))) for _ in range(6)]
        await three.until(lambda: sum(three.images_on().values()) == 7)
        assert sorted(three.images_on().values()) == [1, 3, 3]
        three.release()
        await asyncio.gather(long, *short)
        assert [link.work for link in three.router.replicas] == [0, 0, 0]
        assert [link.num_running for link in three.router.replicas] == [0, 0, 0]

    async def test_the_images_of_one_request_are_parted_and_put_together(self, three):
        three.hold()
        call = asyncio.create_task(events_of(three.stub.GenerateStream(request(num_images_per_prompt=5))))
        await three.until(lambda: sum(three.images_on().values()) == 5)
        assert sorted(three.images_on().values()) == [1, 2, 2]
        three.release()
        events = await call
        images = sorted((event.image for event in events if event.HasField("image")), key=lambda image: image.index)
        assert [image.index for image in images] == [0, 1, 2, 3, 4]
        assert [image.seed for image in images] == [5, 6, 7, 8, 9]
        assert [color(image) for image in images] == [expected_color(seed) for seed in range(5, 10)]
        done = events[-1].done
        assert (done.parameters.num_images_per_prompt, done.parameters.seed) == (5, 5)
        assert kinds(events).count("done") == 1 and kinds(events)[0] == "queued"
        for index in range(5):
            steps = [event.step.step for event in events if event.HasField("step") and event.step.image_index == index]
            assert steps and steps == sorted(steps) and steps[-1] == 4

    async def test_one_part_refused_is_the_whole_request_refused_and_the_others_stop(self, three):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await three.stub.Generate(request(num_images_per_prompt=3, scheduler="lcm", num_inference_steps=60))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await three.until(lambda: not sum(three.images_on().values()))

    async def test_a_hang_up_frees_every_replica(self, three):
        call = three.stub.GenerateStream(request(num_images_per_prompt=6, num_inference_steps=1000))
        async for event in call:
            if event.HasField("step") and event.step.step > 3:
                break
        call.cancel()
        await three.until(lambda: not sum(three.images_on().values()))
        assert [link.work for link in three.router.replicas] == [0, 0, 0]

    async def test_parted_requests_of_one_id_do_not_meet_on_any_replica(self, three):
        three.hold()
        metadata = (("x-request-id", "mine"),)
        calls = [
            asyncio.create_task(events_of(three.stub.GenerateStream(request(**six), metadata=metadata)))
            for six in [{"num_images_per_prompt": 6}] * 3
        ]
        await three.until(lambda: sum(three.images_on().values()) == 18)
        three.release()
        for events in await asyncio.gather(*calls):
            assert {event.request_id for event in events} == {"mine"}
            assert sorted(event.image.index for event in events if event.HasField("image")) == list(range(6))

    async def test_the_servers_description_counts_all_and_shows_each(self, three):
        await three.stub.Generate(request(num_images_per_prompt=6))
        await three.lose(1, KILLED)
        info = await three.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert [(replica.index, replica.is_ready) for replica in info.replicas] == [(0, True), (1, False), (2, True)]
        assert info.activity.num_images == sum(r.activity.num_images for r in info.replicas if r.is_ready) == 4
        assert info.activity.max_slots == 8


class TestALostReplica:
    async def held_on_one(self, deployment: Deployment, **fields) -> tuple[int, asyncio.Task]:
        """A request that runs on a replica that makes no step; which one, and its events to come."""
        deployment.hold()
        call = asyncio.create_task(events_of(deployment.stub.GenerateStream(request(**fields))))
        await deployment.until(lambda: sum(deployment.images_on().values()) == 1)
        [index] = [index for index, running in deployment.images_on().items() if running]
        return index, call

    async def test_its_requests_are_made_again_elsewhere(self, three):
        index, call = await self.held_on_one(three)
        await three.lose(index, KILLED)
        three.release()
        events = await call
        assert kinds(events).count("restarted") == 1
        [restarted] = [event.restarted for event in events if event.HasField("restarted")]
        assert list(restarted.image_indexes) == [0]
        [image] = [event.image for event in events if event.HasField("image")]
        assert color(image) == expected_color(5)
        assert kinds(events)[-1] == "done"

    async def test_one_with_an_image_is_made_again_from_the_same_pixels(self, three):
        image, mask = some(size=(64, 64)), some("L", (64, 64))
        asked = {"image": file_of(image), "mask_image": file_of(mask), "strength": 0.5}
        index, call = await self.held_on_one(three, **asked)
        await three.lose(index, KILLED)
        three.release()
        events = await call
        assert (kinds(events).count("restarted"), kinds(events)[-1]) == (1, "done")
        plans = [plan for replica in three.replicas.values() for plan in replica.engine.plans]
        [sample] = [sample for plan in plans for sample in plan.joins]
        assert sample.input_image == InputImage(rgb=image.tobytes(), mask=mask.tobytes())

    async def test_a_unary_caller_only_sees_a_later_answer(self, three):
        three.hold()
        call = asyncio.create_task(anext_response(three))
        await three.until(lambda: sum(three.images_on().values()) == 1)
        [index] = [index for index, running in three.images_on().items() if running]
        await three.lose(index, KILLED)
        three.release()
        response = await call
        assert [color(image) for image in response.images] == [expected_color(5)]

    async def test_only_the_images_of_the_lost_one_are_made_again(self, three):
        three.hold()
        call = asyncio.create_task(events_of(three.stub.GenerateStream(request(num_images_per_prompt=3))))
        await three.until(lambda: sum(three.images_on().values()) == 3)
        await three.lose(2, KILLED)
        three.release()
        events = await call
        [restarted] = [event.restarted for event in events if event.HasField("restarted")]
        assert len(restarted.image_indexes) == 1
        images = sorted((event.image for event in events if event.HasField("image")), key=lambda image: image.index)
        assert [color(image) for image in images] == [expected_color(seed) for seed in (5, 6, 7)]

    async def test_without_another_one_it_waits_for_the_restart(self, tmp_path):
        async with deployment_of(tmp_path, 1) as single:
            _, call = await self.held_on_one(single)
            await single.lose(0, KILLED)
            await asyncio.sleep(0.1)
            await single.start(0)
            assert kinds(await call)[-1] == "done"

    async def test_those_who_wait_have_a_bound_and_the_next_one_is_told_when_to_come_again(self, tmp_path, monkeypatch):
        monkeypatch.setattr(router, "MAX_WAITING", 2)
        async with deployment_of(tmp_path, 1) as single:
            await single.lose(0, KILLED)
            waiting = [asyncio.create_task(events_of(single.stub.GenerateStream(request()))) for _ in range(2)]
            await single.until(lambda: len(single.router._waiting) == 2)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await single.stub.Generate(request())
            error = caught.value
            refusal = decode_error(error.code(), error.details(), error.trailing_metadata())
            assert (type(refusal), refusal.retry_after_s) == (QueueFullError, router.RETRY_AFTER_S)
            await single.start(0)
            assert [kinds(events)[-1] for events in await asyncio.gather(*waiting)] == ["done", "done"]

    async def test_a_request_under_which_two_crash_is_refused_and_the_third_lives(self, three):
        index, call = await self.held_on_one(three)
        await three.lose(index, CRASHED)
        await three.until(lambda: sum(three.images_on().values()) == 1)
        [second] = [index for index, running in three.images_on().items() if running]
        await three.lose(second, CRASHED)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        error = caught.value
        assert isinstance(decode_error(error.code(), error.details(), error.trailing_metadata()), PoisonedRequestError)
        three.release()
        assert (await three.stub.Generate(request(seed=9))).images

    async def test_who_only_waited_is_not_to_blame(self, tmp_path):
        async with deployment_of(tmp_path, 1, max_slots=1) as single:
            single.hold()
            calls = [asyncio.create_task(events_of(single.stub.GenerateStream(request(seed=seed)))) for seed in (1, 2)]
            for num_images in (2, 1, 1):  # both; the one that was in work, alone; the other one, alone
                await single.until(lambda num_images=num_images: sum(single.images_on().values()) == num_images)
                await asyncio.sleep(0.1)  # for the news that one has begun to arrive
                await single.lose(0, CRASHED)
                await single.start(0, is_held=True)
            single.release()
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            refused = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
            assert len(refused) == 1, outcomes

    async def test_what_is_learnt_of_one_life_does_not_speak_against_the_next(self, tmp_path):
        async with deployment_of(tmp_path, 1) as single:
            _, call = await self.held_on_one(single)
            old = single.router.replicas[0].connection
            await single.lose(0, KILLED)
            await single.start(0)
            old.is_broken = True  # news of the old one that comes late
            assert single.router.is_up and kinds(await call)[-1] == "done"
            assert old.num_running == old.work == single.router.replicas[0].work == 0

    async def test_a_connection_that_broke_under_a_living_replica_is_used_again(self, tmp_path, monkeypatch):
        monkeypatch.setattr(replica_client, "PROBE_EVERY_S", 0.05)
        async with deployment_of(tmp_path, 1) as single:
            single.router.replicas[0].connection.note_break()
            assert not single.router.is_up
            await single.until(lambda: single.router.is_up)
            assert kinds(await events_of(single.stub.GenerateStream(request())))[-1] == "done"

    async def test_a_stream_closed_with_its_channel_is_a_lost_replica(self, three):
        """grpc reports a closed channel as a cancellation."""
        three.hold()
        call = asyncio.create_task(events_of(three.stub.GenerateStream(request())))
        await three.until(lambda: sum(three.images_on().values()) == 1)
        [(index, _)] = [(index, num) for index, num in three.images_on().items() if num]
        connection = three.router.replicas[index].connection
        connection.lost.set_result(KILLED)
        try:
            await connection.channel.close()
            three.release()
            events = await asyncio.wait_for(call, PATIENCE_S)
            assert kinds(events).count("restarted") == 1 and kinds(events)[-1] == "done"
        finally:
            connection.lost = asyncio.get_running_loop().create_future()

    async def test_in_a_crowd_a_kill_from_outside_is_nobodys_fault(self, three):
        three.hold()
        calls = [asyncio.create_task(events_of(three.stub.GenerateStream(request(seed=i)))) for i in range(12)]
        await three.until(lambda: sum(three.images_on().values()) == 12)
        for index in (0, 1):
            await three.lose(index, KILLED)
            await three.start(index, is_held=True)
        await three.until(lambda: sum(three.images_on().values()) >= 8)
        three.release()
        for seed, events in enumerate(await asyncio.gather(*calls)):
            [image] = [event.image for event in events if event.HasField("image")]
            assert color(image) == expected_color(seed)


async def anext_response(deployment: Deployment) -> pb.GenerateResponse:
    return await deployment.stub.Generate(request())

"""Many callers on one replica over real gRPC: who goes first, what each is told meanwhile, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from fake_engine import FakeEngine
from google.rpc import error_details_pb2, status_pb2
from patience import PATIENCE_S
from servers import Turnstile

from mii_serve.proto.metadata import CLIENT_ID_KEY
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.replica.loop import ReplicaLoop
from mii_serve.types import ImageFormat, OutputOptions, Priority, RequestedParams, ResolvedRequest


def request(**fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"prompt": "a red circle", "seed": 5, **fields})


async def events_of(call) -> list[pb.GenerateEvent]:
    return [event async for event in call]


class TestPreviews:
    async def test_they_come_as_often_as_asked_for_and_are_pictures(self, server):
        server.engine.gate = turnstile = Turnstile()
        output = pb.OutputOptions(format=pb.IMAGE_FORMAT_RAW_RGB, preview_every=3)
        previews = []
        turnstile.let(3)
        async for event in server.stub.GenerateStream(request(num_inference_steps=10, output=output)):
            if event.WhichOneof("event") == "preview":
                previews.append(event.preview)
                turnstile.let(3)
            if event.WhichOneof("event") == "image":
                image = event.image
        assert [preview.step for preview in previews] == [3, 6, 9]
        assert {(preview.height, preview.width, preview.data) for preview in previews} == {(64, 64, image.data)}

    async def test_nobody_gets_one_who_has_not_asked(self, server):
        events = await events_of(server.stub.GenerateStream(request(num_inference_steps=10)))
        assert "preview" not in {event.WhichOneof("event") for event in events}

    @pytest.mark.parametrize("every", [0, -1])
    async def test_a_senseless_interval_is_refused(self, server, every):
        call = server.stub.GenerateStream(request(output=pb.OutputOptions(preview_every=every)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert field_of(caught.value) == "output.preview_every"

    async def test_a_call_without_a_stream_has_nowhere_to_show_them(self, server):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.stub.Generate(request(output=pb.OutputOptions(preview_every=1)))
        assert field_of(caught.value) == "output.preview_every"


def field_of(error: grpc.aio.AioRpcError) -> str:
    raw = dict(error.trailing_metadata())["grpc-status-details-bin"]
    violations = error_details_pb2.BadRequest()
    assert any(detail.Unpack(violations) for detail in status_pb2.Status.FromString(raw).details)
    return violations.field_violations[0].field


class TestWhoGoesFirst:
    """The engine is held while everybody gets in line; the order in which samples then join is what was decided."""

    async def joined(self, server, calls) -> list[str]:
        server.engine.gate.clear()
        first = asyncio.create_task(events_of(server.stub.GenerateStream(request())))
        await server.until(lambda: server.loop.activity().num_running == 1)
        waiting = []
        for name, fields, client in calls:
            metadata = (("x-request-id", name), *([(CLIENT_ID_KEY, client)] if client else []))
            call = server.stub.GenerateStream(request(**fields), metadata=metadata)
            events = aiter(call)
            assert (await anext(events)).WhichOneof("event") == "queued"  # in line before the next one comes
            waiting.append(asyncio.create_task(events_of(events)))
        server.engine.gate.set()
        await asyncio.gather(first, *waiting)
        ids = [sample.id.request_id for plan in server.engine.plans for sample in plan.joins]
        named = [request_id.partition(" ")[0] for request_id in ids]  # the front numbers what it sends to replicas
        return [name for name in named if name in {name for name, _, _ in calls}]

    async def test_a_caller_with_one_request_does_not_wait_for_all_of_another(self, server):
        crowd = [(f"crowd-{i}", {}, "busy") for i in range(6)]
        order = await self.joined(server, [*crowd, ("single", {}, "modest")])
        assert order.index("single") <= 1
        assert [name for name in order if name != "single"] == [name for name, _, _ in crowd]

    async def test_who_an_address_calls_for_are_callers_of_their_own(self, server):
        crowd = [(f"crowd-{i}", {}, "busy") for i in range(6)]
        assert (await self.joined(server, [*crowd, ("single", {}, "")])).index("single") <= 1
        order = await self.joined(server, [*[(f"again-{i}", {}, "busy") for i in range(6)], ("same", {}, "busy")])
        assert order[-1] == "same"

    async def test_a_high_priority_goes_before_what_waits(self, server):
        low = [(f"low-{i}", {"priority": pb.PRIORITY_LOW}, "") for i in range(4)]
        order = await self.joined(server, [*low, ("high", {"priority": pb.PRIORITY_HIGH}, "")])
        assert order[0] == "high"
        assert sorted(order[1:]) == [name for name, _, _ in low], "the others are served all the same"

    async def test_an_unknown_priority_is_refused(self, server):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.stub.Generate(request(priority=99))
        assert field_of(caught.value) == "priority"


class TestWhatACallerIsTold:
    async def test_steps_come_with_an_estimate_of_the_time_left(self, server):
        events = await events_of(server.stub.GenerateStream(request(num_inference_steps=200)))
        left = [event.step.estimated_left_s for event in events if event.step.HasField("estimated_left_s")]
        assert left and all(estimate >= 0 for estimate in left)
        assert left[-1] == 0, "the last step leaves nothing to do"

    async def test_who_waits_is_told_again_as_soon_as_there_is_an_estimate(self, server):
        server.engine.gate.clear()
        ahead = [asyncio.create_task(events_of(server.stub.GenerateStream(request()))) for _ in range(4)]
        await server.until(lambda: server.loop.activity().num_waiting == 3)
        call = aiter(server.stub.GenerateStream(request()))
        assert (await anext(call)).queued.num_samples_ahead == 3
        await asyncio.sleep(0.6)
        server.engine.gate.set()
        events = await events_of(call)
        await asyncio.gather(*ahead)
        again = [event.queued for event in events if event.WhichOneof("event") == "queued"]
        assert again and all(queued.num_samples_ahead <= 3 for queued in again)
        assert again[0].estimated_wait_s > 0.6, "three more of these turns, the first of which took that long"

    async def test_what_cannot_be_done_in_time_is_refused_before_a_step(self, server):
        server.engine.gate.clear()
        slow = asyncio.create_task(events_of(server.stub.GenerateStream(request())))
        await asyncio.sleep(0.5)
        server.engine.gate.set()
        await slow
        steps = server.loop.activity().num_steps
        server.engine.gate.clear()
        busy = asyncio.create_task(events_of(server.stub.GenerateStream(request())))
        await server.until(lambda: server.loop.activity().num_running == 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.stub.Generate(request(num_inference_steps=1000), timeout=5)
        server.engine.gate.set()
        await busy
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "are left" in caught.value.details(), "the server's words, not the client's clock"
        assert server.loop.activity().num_steps == steps + 4


@pytest.mark.slow
async def test_hundreds_of_requests_with_random_cancels_leave_nothing_behind():
    generator = random.Random(0)
    engine, engine_thread = FakeEngine(max_slots=8), ThreadPoolExecutor(1)
    loop = ReplicaLoop(engine, engine_thread, max_waiting_samples=4096)
    turns = asyncio.create_task(loop.run())
    output = OutputOptions(format=ImageFormat.RAW_RGB, preview_every=3)

    async def call(name: str) -> bool:
        asked = RequestedParams(
            prompt=f"prompt {name}",
            num_inference_steps=generator.randint(1, 12),
            num_images_per_prompt=generator.randint(1, 4),
            height=generator.choice([64, 72]),
        )
        params = engine.capabilities.resolve(asked, fallback_seed=1)
        leaves_after = generator.randint(0, 12) if generator.random() < 0.4 else None
        request = ResolvedRequest(params=params, output=output, priority=generator.choice(list(Priority)))
        stream = loop.generate(name, request, client=f"client {generator.randint(0, 9)}")
        num_events = 0
        async for _ in stream:
            num_events += 1
            if num_events == leaves_after:
                await stream.aclose()
                return False
        return True

    async def serve(first: int, last: int) -> int:
        done = 0
        for start in range(first, last, 50):
            done += sum(await asyncio.gather(*(call(f"r{i}") for i in range(start, start + 50))))
        return done

    def settled() -> int:
        engine.plans.clear()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    try:
        await serve(0, 400)
        tracemalloc.start()
        before = settled()
        done = await serve(400, 1400)
        async with asyncio.timeout(PATIENCE_S):
            while loop.activity().num_running or loop.activity().num_waiting or engine._running:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        grown = settled() - before
    finally:
        tracemalloc.stop()
        turns.cancel()
        await asyncio.gather(turns, return_exceptions=True)
        engine_thread.shutdown()
    assert 500 < done < 950
    assert not loop._generations and not loop._encoding
    assert grown < 100_000, f"{grown} bytes for 1,000 requests"

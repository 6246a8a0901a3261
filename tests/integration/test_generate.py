"""Requests over real gRPC: answers, order of events, refusals, cancellation, failure."""

from __future__ import annotations

import asyncio
import gc
import io
import random
import threading

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from patience import PATIENCE_S
from PIL import Image

from mii_serve.client import AsyncClient, PreviewReady
from mii_serve.errors import EngineLostError, UnavailableError
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.provenance.marks import PNG_XMP
from mii_serve.server import router
from mii_serve.types import Event, RequestedParams, ResolvedRequest


def request(**fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"prompt": "a red circle", "seed": 5, **fields})


async def test_the_answer_holds_the_pictures_and_what_was_really_done(server):
    response = await server.stub.Generate(request(num_images_per_prompt=2))
    for i, image in enumerate(response.images):
        picture = Image.open(io.BytesIO(image.data))
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (64, 64))
        assert picture.getpixel((0, 0)) == tuple(random.Random(5 + i).randbytes(3))
        assert (image.index, image.seed, image.nsfw_content_detected) == (i, 5 + i, False)
    done = response.parameters
    assert (done.scheduler, done.num_inference_steps, done.guidance_scale) == ("pndm", 4, 7.5)
    assert (done.height, done.width, done.engine, done.dtype, done.model) == (64, 64, "fake", "fp32", "fake")
    assert 0 <= response.timings.queued_s <= response.timings.total_s
    assert response.request_id


async def test_how_a_prompt_was_read_and_which_steps_were_made_is_told(server):
    told = {"clip_skip": 2, "prompt_syntax": "a1111", "sigmas": [14.615, 2.0, 0.0], "eta": 0.5}
    done = (await server.stub.Generate(request(prompt="a (red:1.2) circle", **told))).parameters
    assert (done.clip_skip, done.prompt_syntax, list(done.sigmas), done.eta) == (2, "a1111", told["sigmas"], 0.5)
    assert (done.num_inference_steps, list(done.timesteps), done.has_prompt_embeds) == (2, [], False)
    embeds = pb.PromptEmbeds(num_tokens=77, width=768, dtype="fp16", data=bytes(2 * 77 * 768))
    done = (await server.stub.Generate(pb.GenerateRequest(prompt_embeds=embeds))).parameters
    assert (done.has_prompt_embeds, done.prompt, done.HasField("clip_skip"), done.prompt_syntax) == (True, "", False, "plain")


async def test_a_seed_nobody_named_is_drawn_and_told(server):
    seeds = {(await server.stub.Generate(pb.GenerateRequest(prompt="p"))).parameters.seed for _ in range(4)}
    assert len(seeds) == 4


async def test_events_come_in_order_and_every_step_counts(server):
    call = server.stub.GenerateStream(request(num_images_per_prompt=2, num_inference_steps=3))
    events = [event async for event in call]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "queued"
    assert kinds[-1] == "done"
    assert kinds.count("image") == 2
    for i in range(2):
        steps = [e.step.step for e in events if e.WhichOneof("event") == "step" and e.step.image_index == i]
        assert steps == sorted(steps)
        assert steps[-1] == 3
    assert len({event.request_id for event in events}) == 1
    assert server.loop.activity().num_steps == 6


@pytest.mark.parametrize(
    ("name", "magic"),
    [("IMAGE_FORMAT_JPEG", b"\xff\xd8\xff"), ("IMAGE_FORMAT_WEBP", b"RIFF"), ("IMAGE_FORMAT_PNG", b"\x89PNG")],
)
async def test_a_picture_comes_in_the_format_asked_for(server, name, magic):
    response = await server.stub.Generate(request(output=pb.OutputOptions(format=name)))
    assert response.images[0].data.startswith(magic)
    assert response.images[0].format == pb.ImageFormat.Value(name)


async def test_raw_rgb_is_height_times_width_times_three_bytes(server):
    output = pb.OutputOptions(format="IMAGE_FORMAT_RAW_RGB")
    response = await server.stub.Generate(request(height=64, width=128, output=output))
    assert response.images[0].data == random.Random(5).randbytes(3) * (64 * 128)


async def test_png_metadata_is_written_when_asked_for_and_not_otherwise(server):
    def texts(response):
        return Image.open(io.BytesIO(response.images[0].data)).text

    asked = request(output=pb.OutputOptions(embed_metadata=True), negative_prompt="ü", num_images_per_prompt=1)
    found = texts(await server.stub.Generate(asked))
    assert "Seed: 5" in found["parameters"]
    assert '"negative_prompt": "ü"' in found["mii_serve"]
    assert list(texts(await server.stub.Generate(request()))) == [PNG_XMP]


async def test_a_flagged_picture_is_totally_black_and_says_so(server):
    response = await server.stub.Generate(request(prompt="a white skull"))
    assert response.images[0].nsfw_content_detected
    assert Image.open(io.BytesIO(response.images[0].data)).getextrema() == ((0, 0),) * 3


async def refused(awaitable) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value


async def test_a_broken_rule_is_invalid_argument_with_the_field_in_the_details(server):
    error = await refused(server.stub.Generate(request(height=65)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "height: must be a multiple of 8 in [64, 1024], got 65"
    trailing = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    bad_request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad_request) for detail in status.details)
    assert bad_request.field_violations[0].field == "height"
    assert not server.engine.plans, "a refusal costs the engine nothing"


async def test_what_only_the_schedulers_know_is_refused_in_the_same_way(server):
    error = await refused(server.stub.Generate(request(scheduler="lcm", num_inference_steps=100)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith("num_inference_steps: ")


async def test_a_full_queue_is_resource_exhausted_and_loses_nobody(server):
    server.engine.gate.clear()
    accepted = [asyncio.create_task(collect(server, seed=i)) for i in range(9)]
    await server.until(lambda: server.loop.activity().num_waiting == 8)
    error = await refused(server.stub.Generate(request()))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    server.engine.gate.set()
    responses = await asyncio.gather(*accepted)
    assert [response.parameters.seed for response in responses] == list(range(9))


async def collect(server, **fields) -> pb.GenerateResponse:
    return await server.stub.Generate(request(**fields))


async def test_a_message_beyond_the_bound_is_refused(server):
    error = await refused(server.stub.Generate(request(prompt="x" * 10_000_000)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await server.stub.Generate(request())


async def test_garbage_bytes_get_a_status_and_harm_nobody(server):
    send = server.channel.unary_unary("/mii_serve.v1.ImageGeneration/Generate")
    generator = random.Random(0)
    for _ in range(200):
        error = await refused(send(generator.randbytes(generator.randint(1, 200))))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    await server.stub.Generate(request())


# ---- going away --------------------------------------------------------------------------------------------------


async def test_a_caller_that_hangs_up_frees_its_slot_at_the_next_turn(server):
    call = server.stub.GenerateStream(request(num_inference_steps=1000))
    async for event in call:
        if event.WhichOneof("event") == "step" and event.step.step >= 3:
            break
    server.engine.gate.clear()
    call.cancel()
    await server.until(lambda: server.loop.activity().num_cancelled_requests == 1)
    steps_when_noticed = server.loop.activity().num_steps
    server.engine.gate.set()
    await server.until(lambda: server.loop.activity().num_running == 0 and server.engine.plans[-1].leaves)
    assert server.loop.activity().num_steps <= steps_when_noticed + 1, "only the turn that was running"
    assert (await server.stub.Generate(request())).images


async def test_a_deadline_frees_the_slot_like_a_hang_up(server):
    server.engine.gate.clear()
    waiting = server.stub.Generate(request(num_inference_steps=1000), timeout=0.3)
    error = await refused(waiting)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await server.until(lambda: server.loop.activity().num_cancelled_requests == 1)
    server.engine.gate.set()
    await server.until(lambda: server.loop.activity().num_running == 0)
    assert server.loop.activity().num_steps <= 1
    assert (await server.stub.Generate(request())).images


async def test_a_request_that_waits_can_be_given_up_without_a_step(server):
    server.engine.gate.clear()
    running = asyncio.create_task(collect(server))
    await server.until(lambda: server.loop.activity().num_running == 1)
    waiting = server.stub.GenerateStream(request(num_images_per_prompt=4))
    queued = await waiting.read()
    assert queued.queued.num_samples_ahead == 0, "it is the next one"
    assert server.loop.activity().num_waiting == 4
    waiting.cancel()
    await server.until(lambda: server.loop.activity().num_waiting == 0)
    server.engine.gate.set()
    await running
    assert server.loop.activity().num_steps == 4


async def test_no_hang_up_is_lost_at_whatever_moment_it_comes(two_slots):
    gc.disable()  # a slot that only the garbage collector gives back is a slot lost
    try:
        for i in range(60):
            call = two_slots.stub.GenerateStream(request(num_inference_steps=1000, seed=i))
            async for event in call:
                if event.WhichOneof("event") == "step" and event.step.step > i % 7:
                    break
            call.cancel()
        activity = two_slots.loop.activity
        # On a fast machine one may have come to its end before its caller left.
        await two_slots.until(lambda: activity().num_cancelled_requests + activity().num_images == 60)
        await two_slots.until(lambda: activity().num_running == 0)
    finally:
        gc.enable()


async def test_others_do_not_notice_a_hang_up(two_slots):
    call = two_slots.stub.GenerateStream(request(num_inference_steps=1000))
    await call.read()
    others = [asyncio.create_task(collect(two_slots, seed=i, num_inference_steps=30)) for i in range(6)]
    call.cancel()
    assert [response.parameters.seed for response in await asyncio.gather(*others)] == list(range(6))


async def test_a_slow_reader_gets_the_latest_step_and_all_pictures(server):
    call = server.stub.GenerateStream(request(num_inference_steps=900))
    await server.until(lambda: server.loop.activity().num_images == 1)
    events = [event async for event in call]
    assert [event.WhichOneof("event") for event in events][-2:] == ["image", "done"]


# ---- failure -----------------------------------------------------------------------------------------------------


async def test_an_engine_failure_is_the_end_of_the_replica(server):
    """For the loop; the front makes the requests again on another replica."""
    resolved = ResolvedRequest(params=server.engine.capabilities.resolve(RequestedParams(prompt="p"), fallback_seed=1))

    async def generate(name: str) -> list[Event]:
        return [event async for event in server.loop.generate(name, resolved)]

    server.engine.gate.clear()
    calls = [asyncio.create_task(generate(str(number))) for number in range(3)]
    await server.until(lambda: server.loop.activity().num_waiting == 2)
    server.engine.fail_next()
    server.engine.gate.set()
    for error in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(error, EngineLostError) and "told to fail" in str(error)
    with pytest.raises(UnavailableError):
        await generate("late")


async def test_a_sample_that_fails_by_itself_fails_its_request_only(two_slots):
    two_slots.engine.gate.clear()
    two_slots.engine.fail_sample_of("unlucky")
    metadata = (("x-request-id", "unlucky"),)
    unlucky = asyncio.create_task(refused(two_slots.stub.Generate(request(num_images_per_prompt=3), metadata=metadata)))
    await two_slots.until(lambda: two_slots.loop.activity().num_running == 2)
    others = [asyncio.create_task(collect(two_slots, seed=i)) for i in range(2)]
    two_slots.engine.gate.set()
    error = await unlucky
    assert error.code() is grpc.StatusCode.INTERNAL
    assert [response.parameters.seed for response in await asyncio.gather(*others)] == [0, 1]
    assert two_slots.loop.activity().num_running == two_slots.loop.activity().num_waiting == 0


@pytest.mark.slow
async def test_a_lost_replica_is_unavailable_not_a_riddle(server, monkeypatch):
    monkeypatch.setattr(router, "VERDICT_TIMEOUT_S", 0.2)  # no supervisor says here why it was lost
    server.engine.gate.clear()
    call = asyncio.create_task(refused(server.stub.Generate(request())))
    await server.until(lambda: server.loop.activity().num_running == 1)
    await server.replica_server.stop(0)
    assert (await call).code() is grpc.StatusCode.UNAVAILABLE
    error = await refused(server.stub.Generate(request()))
    assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_while_draining_new_work_is_refused_and_running_work_finishes(server):
    server.engine.gate.clear()
    running = asyncio.create_task(collect(server))
    await server.until(lambda: server.loop.activity().num_running == 1)
    draining = asyncio.create_task(server.dispatcher.drain(20.0))
    await asyncio.sleep(0)
    error = await refused(server.stub.Generate(request()))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    server.engine.gate.set()
    assert await draining is True
    assert (await running).images


async def test_a_drain_has_a_bound(server):
    server.engine.gate.clear()
    call = server.stub.GenerateStream(request())
    await call.read()
    assert await server.dispatcher.drain(0.05) is False
    call.cancel()


async def test_a_flagged_preview_says_so(server):
    async with AsyncClient(server.target) as client:
        for prompt, flag in (("a white skull", True), ("a heart", False)):
            async with client.stream(prompt, preview_every=1) as stream:
                shown = [event async for event in stream if isinstance(event, PreviewReady)]
            assert shown and {preview.nsfw_content_detected for preview in shown} == {flag}


async def test_what_is_shown_of_an_image_comes_before_the_image_however_long_it_takes_to_encode(server, monkeypatch):
    """The preview is encoded only after the picture has been."""
    from mii_serve.replica import loop

    encode, is_picture_encoded, order = loop.encode_picture, threading.Event(), iter(range(100))

    def slow_first(*arguments):
        if next(order) == 0:
            is_picture_encoded.wait(PATIENCE_S)
            return encode(*arguments)
        made = encode(*arguments)
        is_picture_encoded.set()
        return made

    monkeypatch.setattr(loop, "encode_picture", slow_first)
    asked = request(num_inference_steps=2, output=pb.OutputOptions(preview_every=1))
    kinds = [event.WhichOneof("event") async for event in server.stub.GenerateStream(asked)]
    assert [kind for kind in kinds if kind in ("preview", "image", "done")][-3:] == ["preview", "image", "done"]

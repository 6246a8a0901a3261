"""Requests that start from an image, over real gRPC with the SDK: what arrives, what is answered, what is refused."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator

import grpc
import pytest
from fake_engine import FakeEngine
from PIL import Image
from servers import RunningServer, running_server

from mii_serve.client import AsyncClient
from mii_serve.errors import InvalidRequestError, QueueFullError
from mii_serve.proto.codec import MAX_REQUEST_BYTES
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.server import input_images

IMAGE = Image.effect_noise((75, 101), 60).convert("RGB")


@pytest.fixture
async def server(tmp_path) -> AsyncIterator[RunningServer]:
    async with running_server(tmp_path, FakeEngine(max_slots=2, max_decodes=2)) as running:
        yield running


@pytest.fixture
async def client(server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target) as client:
        yield client


def joined(server: RunningServer) -> list:
    return [sample for plan in server.engine.plans for sample in plan.joins]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


async def test_the_engine_gets_the_pixels_and_the_answer_says_what_was_done(server, client):
    result = await client.generate("a", image=IMAGE, strength=0.5, num_inference_steps=6, num_images_per_prompt=2, seed=3)
    assert [image.size for image in result.images] == [(72, 96)] * 2
    done = result.parameters
    assert (done.width, done.height, done.num_inference_steps, done.strength) == (72, 96, 6, 0.5)
    pixels = IMAGE.resize((72, 96), Image.Resampling.LANCZOS).tobytes()
    assert [sample.input_image.rgb for sample in joined(server)] == [pixels] * 2
    assert server.loop.activity().num_steps == 2 * 3


async def test_a_mask_reaches_the_engine_in_the_images_size(server, client):
    mask = Image.linear_gradient("L").resize(IMAGE.size)
    done = (await client.generate("a", image=IMAGE, mask_image=mask)).parameters
    assert (done.strength, done.has_mask) == (1.0, True)
    [sample] = joined(server)
    assert sample.params.has_mask
    assert sample.input_image.mask == mask.resize((72, 96), Image.Resampling.LANCZOS).tobytes()


async def test_a_request_without_an_image_has_no_strength(server, client):
    assert (await client.generate("a")).parameters.strength is None
    [sample] = joined(server)
    assert sample.input_image is None


async def test_files_are_sent_as_they_are_and_a_size_that_is_named_is_the_results(server, client):
    stream = client.stream("a", image=png(IMAGE), width=128, height=64)
    steps = [event.num_steps async for event in stream if type(event).__name__ == "Step"]
    assert steps[0] == 3, "0.8 of 4 steps"
    assert (await stream.result()).images[0].size == (128, 64)


async def test_what_is_refused_names_its_field_and_is_never_queued(server, client):
    refused = [
        ({"image": b"no image"}, "image"),
        ({"image": IMAGE.convert("CMYK")}, "image"),
        ({"image": "a path"}, "image"),
        ({"image": IMAGE, "strength": 0.1, "num_inference_steps": 4}, "strength"),
        ({"strength": 0.5}, "strength"),
        ({"image": IMAGE, "mask_image": IMAGE.rotate(90, expand=True)}, "mask_image"),
        ({"mask_image": IMAGE}, "mask_image"),
    ]
    for asked, field in refused:
        with pytest.raises(InvalidRequestError) as refusal:
            await client.generate("a", **asked)
        assert refusal.value.field == field
    assert server.loop.activity().num_requests == 0


async def test_more_images_than_are_encoded_in_one_go_join_one_turn_later(server, client):
    server.engine._capacity = server.loop._scheduler._capacity = type(server.engine.capacity)(max_slots=4, max_decodes=2)
    await asyncio.gather(*(client.generate("a", image=IMAGE) for _ in range(4)))
    assert max(len(plan.joins) for plan in server.engine.plans) <= 2


async def test_images_that_wait_are_held_within_a_bound_of_memory(server, client, monkeypatch):
    file, pixels = png(IMAGE), 72 * 96 * 3
    monkeypatch.setattr(input_images, "MAX_HELD_BYTES", len(file) + pixels)
    server.engine.gate.clear()
    first = asyncio.create_task(client.generate("a", image=file))
    await server.until(lambda: server.loop.activity().num_running == 1)
    with pytest.raises(QueueFullError, match="MiB of images wait or are worked on already"):
        await client.generate("a", image=file)
    server.engine.gate.set()
    await first
    await client.generate("a", image=file)


async def test_files_beyond_the_bound_are_refused_before_they_are_decoded(client, monkeypatch):
    file = png(IMAGE)
    monkeypatch.setattr(input_images, "MAX_HELD_BYTES", len(file) - 1)

    def decode(*_: object, **__: object) -> None:
        raise InvalidRequestError("image", "was decoded")

    monkeypatch.setattr("mii_serve.safety.input_image.resolve_with_image", decode)
    with pytest.raises(QueueFullError, match="images wait"):
        await client.generate("a", image=file)


async def test_an_idempotency_key_belongs_to_the_images_bytes(client):
    first = await client.generate("a", image=IMAGE, idempotency_key="k")
    assert (await client.generate("a", image=IMAGE, idempotency_key="k")).encoded == first.encoded
    with pytest.raises(InvalidRequestError, match="another request already"):
        await client.generate("a", image=IMAGE.rotate(180), idempotency_key="k")
    with pytest.raises(InvalidRequestError, match="another request already"):
        await client.generate("a", image=IMAGE, mask_image=IMAGE, strength=0.8, idempotency_key="k")


async def test_the_largest_file_passes_grpcs_bound_and_a_larger_one_is_refused_by_name(server):
    call = server.stub.Generate(pb.GenerateRequest(prompt="a", image=bytes(MAX_REQUEST_BYTES - 1000)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith("image: must be a file of at most 8388608 bytes")

"""Many malformed messages, many idle callers and slow readers: everybody else is served as if they were not there."""

from __future__ import annotations

import asyncio
import math
import random

import grpc
import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from servers import running_server

from mii_serve.errors import InvalidRequestError, MiiServeError, QueueFullError
from mii_serve.proto.codec import CHANNEL_OPTIONS, MAX_REQUEST_BYTES
from mii_serve.proto.status import decode_error
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationStub

METHOD = "/mii_serve.v1.ImageGeneration/Generate"
NUM_MALFORMED = 2000
AT_ONCE = 64


def malformed(chance: random.Random) -> bytes:
    """A message that must be refused."""
    good = pb.GenerateRequest(prompt="a", seed=1)
    kind = chance.randrange(7)
    if kind == 0:
        return b"\xff" + chance.randbytes(chance.randrange(1, 200))  # 0xff opens a field of a wire type that does not exist
    if kind == 1:
        return good.SerializeToString() + b"\x0a\x02\xc3\x28"  # prompt, invalid UTF-8
    if kind == 2:
        return good.SerializeToString() + b"\xc2\x3e\x01a"  # a field nobody knows
    if kind == 3:
        number = chance.choice([math.nan, math.inf, -math.inf, -1.0, 1e308])
        return pb.GenerateRequest(prompt="a", guidance_scale=number).SerializeToString()
    if kind == 4:
        field = chance.choice(["height", "width", "num_inference_steps", "num_images_per_prompt"])
        number = chance.choice([-(2**31), -1, 0, 7, 2**31 - 1])
        return pb.GenerateRequest(
            prompt="a", **{field: -5 if field.startswith("num") and number == 7 else number}
        ).SerializeToString()
    if kind == 5:
        return pb.GenerateRequest(prompt="x" * chance.choice([5000, 400_000])).SerializeToString()
    output = chance.choice([pb.OutputOptions(format=99), pb.OutputOptions(quality=-1), pb.OutputOptions(quality=80)])
    return pb.GenerateRequest(prompt="a", output=output).SerializeToString()


def typed(error: grpc.aio.AioRpcError) -> MiiServeError:
    return decode_error(error.code(), error.details(), error.trailing_metadata())


@pytest.mark.slow
async def test_thousands_of_malformed_messages_get_typed_errors_and_harm_nobody(server):
    chance, kinds = random.Random(3), set()
    raw = server.channel.unary_unary(METHOD)
    bound = asyncio.Semaphore(AT_ONCE)

    async def send(message: bytes) -> None:
        async with bound:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await raw(message, timeout=PATIENCE_S)
            error = typed(caught.value)
            assert type(error) is InvalidRequestError, (message[:80], caught.value.code(), caught.value.details())
            assert error.field
            kinds.add(error.field)

    await asyncio.gather(*(send(malformed(chance)) for _ in range(NUM_MALFORMED)))
    assert len(kinds) >= 8, kinds
    assert server.loop.activity().num_requests == 0
    assert (await server.stub.Generate(pb.GenerateRequest(prompt="a"))).images


async def test_a_message_of_a_huge_size_is_refused_unread(server):
    raw = server.channel.unary_unary(METHOD)
    for size in (MAX_REQUEST_BYTES + 1, 64 * 1024 * 1024):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw(b"\x00" * size, timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert isinstance(typed(caught.value), QueueFullError | MiiServeError)
    assert (await server.stub.Generate(pb.GenerateRequest(prompt="a"))).images


@pytest.mark.slow
async def test_a_thousand_idle_streams_and_fifty_active_callers(tmp_path):
    async with running_server(tmp_path, FakeEngine(max_slots=8), max_waiting_samples=4096) as server:
        server.engine.gate.clear()  # nothing is measured yet, so nobody is refused for the length of the line
        options = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))  # else all channels would share one connection
        channels = [grpc.aio.insecure_channel(server.target, options=options) for _ in range(50)]
        slow = pb.GenerateRequest(prompt="idle", num_inference_steps=1000, priority=pb.PRIORITY_LOW)
        idle = [ImageGenerationStub(channels[i % 50]).GenerateStream(slow) for i in range(1000)]
        await asyncio.gather(*(call.read() for call in idle))  # each is in line, and then never reads again
        assert server.loop.activity().num_running + server.loop.activity().num_waiting > 900

        async def draw(channel: grpc.aio.Channel, seed: int) -> int:
            request = pb.GenerateRequest(prompt="a", seed=seed, num_inference_steps=4, priority=pb.PRIORITY_HIGH)
            return (await ImageGenerationStub(channel).Generate(request, timeout=PATIENCE_S)).images[0].seed

        active = [asyncio.create_task(draw(channels[i], i)) for i in range(50)]
        await server.until(lambda: server.loop.activity().num_requests == 1050)
        server.engine.gate.set()
        assert await asyncio.gather(*active) == list(range(50))
        for call in idle:
            call.cancel()
        await server.until(lambda: server.loop.activity().num_running + server.loop.activity().num_waiting == 0)
        for channel in channels:
            await channel.close()


async def test_who_reads_slowly_slows_nobody(server):
    big = pb.GenerateRequest(prompt="a", num_inference_steps=200, num_images_per_prompt=4)
    big.output.format, big.output.preview_every = pb.IMAGE_FORMAT_RAW_RGB, 1
    slow = server.stub.GenerateStream(big)
    await slow.read()
    async with grpc.aio.insecure_channel(server.target, options=CHANNEL_OPTIONS) as channel:
        for seed in range(20):
            assert (
                await ImageGenerationStub(channel).Generate(pb.GenerateRequest(prompt="b", seed=seed), timeout=PATIENCE_S)
            ).images
    kinds = []
    while (event := await slow.read()) is not grpc.aio.EOF:
        kinds.append(event.WhichOneof("event"))
    assert kinds.count("image") == 4 and kinds[-1] == "done"


async def test_a_full_line_says_when_to_come_again(server):
    server.engine.gate.clear()
    calls = [asyncio.create_task(read_all(server.stub.GenerateStream(pb.GenerateRequest(prompt="a")))) for _ in range(12)]
    await server.until(lambda: server.loop.activity().num_waiting == 8 or any(call.done() for call in calls))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        for _ in range(12):
            await server.stub.Generate(pb.GenerateRequest(prompt="a"), timeout=PATIENCE_S)
    error = typed(caught.value)
    assert isinstance(error, QueueFullError) and error.retry_after_s is not None and error.retry_after_s > 0
    server.engine.gate.set()
    await asyncio.gather(*calls, return_exceptions=True)


async def read_all(call) -> None:
    async for _ in call:
        pass

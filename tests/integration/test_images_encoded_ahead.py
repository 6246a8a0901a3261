"""Images are encoded before their samples join: no turn of others waits for that, and who leaves meanwhile is forgotten."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
from fake_engine import FakeEngine
from PIL import Image
from servers import RunningServer, running_server

from mii_serve.client import AsyncClient
from mii_serve.errors import DeadlineExceededError, EngineError

IMAGE = Image.effect_noise((64, 64), 60).convert("RGB")


class EncodingFakeEngine(FakeEngine):
    """Implements `mii_serve.engine.turns.EncodingEngine`; what it makes of an image is the request's seed."""

    encodes_beside = True

    def __init__(self) -> None:
        super().__init__(max_slots=4)
        self.encoding = threading.Event()
        self.num_encoded = 0
        self.fails = False

    def encode_image(self, params, image) -> object:
        self.encoding.wait()
        self.num_encoded += 1
        if self.fails:
            raise EngineError("told to fail")
        return params.seed


@pytest.fixture
async def server(tmp_path) -> AsyncIterator[RunningServer]:
    engine = EncodingFakeEngine()
    async with running_server(tmp_path, engine) as running:
        yield running
        engine.encoding.set()


@pytest.fixture
async def client(server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target) as client:
        yield client


def joined(server: RunningServer) -> list:
    return [sample for plan in server.engine.plans for sample in plan.joins]


async def test_turns_of_others_go_on_until_the_latents_are_there(server, client):
    waiting = asyncio.create_task(client.generate("a", image=IMAGE, seed=7, num_images_per_prompt=2))
    await server.until(lambda: server.loop._images._one.locked())
    await client.generate("others")
    assert [sample.params.prompt for sample in joined(server)] == ["others"]
    server.engine.encoding.set()
    assert (await waiting).seeds == [7, 8]
    assert [sample.encoded_image for sample in joined(server)[1:]] == [7, 7]
    assert server.engine.num_encoded == 1, "once for all images of the request"


async def test_who_leaves_or_is_late_meanwhile_never_joins(server, client):
    leaving = asyncio.create_task(client.generate("a", image=IMAGE))
    await server.until(lambda: server.loop._images._one.locked())
    with pytest.raises(DeadlineExceededError):
        await client.generate("a", image=IMAGE, timeout=0.2)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await server.until(lambda: not server.dispatcher._active)
    await client.generate("others")  # behind the word that they have left, on the same stream to the replica
    server.engine.encoding.set()
    await server.until(lambda: not server.loop._images._one.locked())
    await client.generate("more")
    assert [sample.params.prompt for sample in joined(server)] == ["others", "more"]


async def test_an_image_that_cannot_be_encoded_fails_its_request_alone(server, client):
    server.engine.encoding.set()
    server.engine.fails = True
    with pytest.raises(EngineError):
        await client.generate("a", image=IMAGE)
    await client.generate("others")

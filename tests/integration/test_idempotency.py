"""The same idempotency key: worked on once, answered alike."""

from __future__ import annotations

import asyncio

import pytest

from mii_serve.client import AsyncClient
from mii_serve.errors import DeadlineExceededError, InvalidRequestError
from mii_serve.server import idempotency


@pytest.fixture
async def client(server):
    async with AsyncClient(server.target) as client:
        yield client


async def test_asking_again_gives_the_same_pictures_without_work(server, client):
    first = await client.generate("a", num_images_per_prompt=2, idempotency_key="k")
    again = await client.generate("a", num_images_per_prompt=2, idempotency_key="k")
    assert again.encoded == first.encoded and again.seeds == first.seeds
    assert server.loop.activity().num_requests == 1
    stream = client.stream("a", num_images_per_prompt=2, idempotency_key="k")
    assert (await stream.result()).encoded == first.encoded
    assert server.loop.activity().num_requests == 1


async def test_asking_while_it_runs_joins(server, client):
    server.engine.gate.clear()
    calls = [asyncio.create_task(client.generate("a", idempotency_key="k")) for _ in range(3)]
    await server.until(lambda: server.loop.activity().num_running == 1)
    server.engine.gate.set()
    results = await asyncio.gather(*calls)
    assert len({result.seeds[0] for result in results}) == 1
    assert server.loop.activity().num_requests == 1


async def test_of_what_passes_only_the_latest_is_kept(server, client):
    server.engine.gate.clear()
    call = asyncio.create_task(client.generate("a", num_inference_steps=200, num_images_per_prompt=2, idempotency_key="k"))
    await server.until(lambda: server.loop.activity().num_running == 1)
    server.engine.gate.set()
    await call
    [work] = server.dispatcher._idempotency._works.values()
    kinds = [type(event).__name__ for event in work.events if event is not None]
    assert sorted(kinds) == sorted(["Queued", *["Started", "Step", "ImageReady"] * 2, "Done"])


async def test_a_caller_who_was_cut_off_may_come_back(server, client):
    server.engine.gate.clear()
    first = asyncio.create_task(client.generate("a", idempotency_key="k"))
    await server.until(lambda: server.loop.activity().num_running == 1)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    second = asyncio.create_task(client.generate("a", idempotency_key="k"))
    await asyncio.sleep(0.1)
    server.engine.gate.set()
    assert (await second).images
    activity = server.loop.activity()
    assert (activity.num_requests, activity.num_cancelled_requests) == (1, 0)


async def test_work_that_nobody_comes_back_for_ends(server, client, monkeypatch):
    monkeypatch.setattr(idempotency, "GRACE_S", 0.05)
    server.engine.gate.clear()
    call = asyncio.create_task(client.generate("a", num_inference_steps=1000, idempotency_key="k"))
    await server.until(lambda: server.loop.activity().num_running == 1)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await server.until(lambda: server.loop.activity().num_cancelled_requests == 1)
    server.engine.gate.set()
    assert (await client.generate("a", num_inference_steps=2, idempotency_key="k")).images


async def test_another_request_with_the_same_key_is_refused(client):
    await client.generate("a", seed=1, idempotency_key="k")
    with pytest.raises(InvalidRequestError, match="x-idempotency-key: was used for another request"):
        await client.generate("a", seed=2, idempotency_key="k")


async def test_failed_work_is_forgotten(server, client):
    server.engine.gate.clear()
    with pytest.raises(DeadlineExceededError):
        await client.generate("a", timeout=0.2, idempotency_key="k")
    again = asyncio.create_task(client.generate("a", idempotency_key="k"))  # joins work whose deadline is not its own
    server.engine.gate.set()
    assert (await again).images


@pytest.mark.parametrize("key", ["", "two words", "x" * 101, "é"])
async def test_a_key_has_a_rule(client, key):
    with pytest.raises(InvalidRequestError, match="x-idempotency-key"):
        await client.generate("a", idempotency_key=key)


async def test_previews_are_not_kept(client):
    with pytest.raises(InvalidRequestError, match=r"output.preview_every"):
        await client.stream("a", preview_every=1, idempotency_key="k").result()

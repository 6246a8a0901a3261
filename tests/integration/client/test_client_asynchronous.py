"""`AsyncClient` against a real server: the same promises, and asyncio's own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest
from patience import PATIENCE_S
from PIL import Image
from scripted_server import RunningServer, all_events, colour, preview, queued, refusal

from mii_serve.client import AsyncClient, Client, Done, PictureReady, Queued, Started, Step, results
from mii_serve.errors import (
    ConfigError,
    DeadlineExceededError,
    InvalidRequestError,
    MiiServeError,
    QueueFullError,
    RequestCancelledError,
    UnavailableError,
)
from mii_serve.types import Event, GenerationRequest, ImageReady, Preview


@pytest.fixture
async def aclient(server: RunningServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target) as client:
        yield client


async def ended(server: RunningServer) -> bool:
    return await asyncio.to_thread(server.servicer.ended.wait, PATIENCE_S)


async def asked(server: RunningServer) -> bool:
    return await asyncio.to_thread(server.servicer.asked.wait, PATIENCE_S)


async def test_both_clients_give_the_same(client: Client, aclient: AsyncClient) -> None:
    result = await aclient.generate("a", num_images_per_prompt=2, seed=5, timeout=PATIENCE_S)
    assert result == await asyncio.to_thread(client.generate, "a", num_images_per_prompt=2, seed=5, timeout=PATIENCE_S)
    assert await aclient.stream("a", num_images_per_prompt=2, seed=5, timeout=PATIENCE_S).result() == result
    assert await aclient.server_info() == await asyncio.to_thread(client.server_info)


async def test_a_stream_tells_every_event_in_order(aclient: AsyncClient) -> None:
    async with aclient.stream("a", seed=7, timeout=PATIENCE_S) as stream:
        events = [event async for event in stream]
    assert [type(event) for event in events] == [Queued, Started, Step, Step, Step, PictureReady, Done]
    picture = events[5]
    assert isinstance(picture, PictureReady)
    assert picture.image.getpixel((0, 0)) == colour(0)
    assert stream.request_id == "request-1"


@pytest.mark.parametrize("how", ["generate", "stream"])
async def test_images_are_decoded_outside_the_event_loop(
    server: RunningServer, aclient: AsyncClient, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    threads: list[int] = []
    decode = results._decode

    def noting(event: ImageReady | Preview) -> Image.Image:
        threads.append(threading.get_ident())
        return decode(event)

    monkeypatch.setattr(results, "_decode", noting)

    def script(request: GenerationRequest) -> Iterator[Event]:
        yield preview(request)
        yield from all_events(request)

    server.servicer.script = script
    await (aclient.generate("a") if how == "generate" else aclient.stream("a").result())
    assert len(threads) == (1 if how == "generate" else 2)
    assert threading.get_ident() not in threads


async def test_cancel_reaches_the_server(server: RunningServer, aclient: AsyncClient) -> None:
    server.servicer.script = server.servicer.endless
    stream = aclient.stream("a", timeout=PATIENCE_S)
    assert isinstance(await anext(stream), Queued)
    asyncio.get_running_loop().call_later(0.05, stream.cancel)
    with pytest.raises(RequestCancelledError, match="the caller cancelled"):
        await stream.result()
    assert await ended(server)


async def test_leaving_the_block_early_cancels(server: RunningServer, aclient: AsyncClient) -> None:
    server.servicer.script = server.servicer.endless
    async with aclient.stream("a", timeout=PATIENCE_S) as stream:
        await anext(stream)
    assert await ended(server)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_cancelling_the_task_cancels_the_request(server: RunningServer, aclient: AsyncClient, is_stream: bool) -> None:
    server.servicer.script = server.servicer.endless
    call = aclient.stream("a", timeout=PATIENCE_S).result() if is_stream else aclient.generate("a", timeout=PATIENCE_S)
    task = asyncio.create_task(call)
    assert await asked(server)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await ended(server)


async def test_a_timeout_of_asyncio_stays_one(server: RunningServer, aclient: AsyncClient) -> None:
    server.servicer.script = server.servicer.endless
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await aclient.stream("a").result()
    assert await ended(server)


async def test_closing_the_client_cancels_what_is_in_flight(server: RunningServer, aclient: AsyncClient) -> None:
    server.servicer.script = server.servicer.endless
    task = asyncio.create_task(aclient.generate("a", timeout=PATIENCE_S))
    assert await asked(server)
    await aclient.close()
    with pytest.raises(RequestCancelledError):
        await task
    assert await ended(server)
    with pytest.raises(RuntimeError, match="is closed"):
        await aclient.generate("a")


async def test_errors_are_typed(server: RunningServer, aclient: AsyncClient) -> None:
    server.servicer.script = refusal(InvalidRequestError("seed", "must be nicer"))
    with pytest.raises(InvalidRequestError) as caught:
        await aclient.generate("a", timeout=PATIENCE_S)
    assert (caught.value.field, caught.value.rule) == ("seed", "must be nicer")
    server.servicer.script = refusal(QueueFullError("the queue is full"))
    with pytest.raises(QueueFullError, match="the queue is full"):
        await aclient.stream("a", timeout=PATIENCE_S).result()
    server.servicer.script = refusal(RequestCancelledError("stopped"))
    with pytest.raises(RequestCancelledError, match="stopped"):
        await aclient.stream("a", timeout=PATIENCE_S).result()
    server.servicer.script = server.servicer.endless
    with pytest.raises(DeadlineExceededError):
        await aclient.generate("a", timeout=0.2)


async def test_a_stream_that_ends_early_or_damaged_is_an_error(server: RunningServer, aclient: AsyncClient) -> None:
    server.servicer.script = lambda request: iter([queued()])
    with pytest.raises(MiiServeError, match="ended before"):
        await aclient.stream("a", timeout=PATIENCE_S).result()

    def damaged(request: GenerationRequest) -> Iterator[Event]:
        for event in all_events(request):
            yield replace(event, encoded=b"not a picture") if isinstance(event, ImageReady) else event

    server.servicer.script = damaged
    with pytest.raises(MiiServeError, match="cannot be read as PNG"):
        await aclient.stream("a", timeout=PATIENCE_S).result()


async def test_an_unreachable_target_is_named() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(UnavailableError, match=r"no answer from 127.0.0.1:1"):
            await client.generate("a", timeout=PATIENCE_S)
        with pytest.raises(UnavailableError, match=r"127.0.0.1:1 is not ready after 0.3 s"):
            await client.wait_ready(0.3)


async def test_wait_ready_returns_once_the_server_serves(server: RunningServer, aclient: AsyncClient) -> None:
    server.set_serving(False)
    assert await aclient.health() == "NOT_SERVING"
    with pytest.raises(UnavailableError, match="its health is NOT_SERVING"):
        await aclient.wait_ready(0.3)
    asyncio.get_running_loop().call_later(0.2, server.set_serving, True)
    await aclient.wait_ready(PATIENCE_S)


async def test_arguments_are_refused_before_the_call(server: RunningServer, aclient: AsyncClient) -> None:
    with pytest.raises(InvalidRequestError, match="one call for each prompt"):
        await aclient.generate(["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        AsyncClient("")
    assert server.servicer.requests == []


async def test_many_calls_share_one_client(aclient: AsyncClient) -> None:
    results = await asyncio.gather(*(aclient.generate("a", seed=seed, timeout=PATIENCE_S) for seed in range(16)))
    assert [result.seeds for result in results] == [[seed] for seed in range(16)]


def test_a_client_may_be_made_before_the_loop_runs(server: RunningServer) -> None:
    client = AsyncClient(server.target)

    async def use() -> list[int]:
        async with client:
            return (await client.generate("a", seed=3, timeout=PATIENCE_S)).seeds

    assert asyncio.run(use()) == [3]

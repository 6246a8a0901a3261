"""A replica that is reached over TCP, with TLS and a token, as one on another machine is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import trustme
from fake_engine import FakeEngine
from patience import PATIENCE_S

from mii_serve.replica import service
from mii_serve.replica.loop import ReplicaLoop
from mii_serve.replica.service import ListenOn, replica_server
from mii_serve.server import replica_client
from mii_serve.server.call import CallContext
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.replica_client import Order, ReplicaAddress, ReplicaConnection, ReplicaLostError
from mii_serve.types import GenerationRequest, RequestedParams, ResolvedRequest

TOKEN = "a token that only its front knows"
REQUEST = GenerationRequest(params=RequestedParams(prompt="a red circle", seed=3))


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def trusting(authority: trustme.CA) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(authority.cert_pem.bytes())


@contextlib.asynccontextmanager
async def remote_replica(authority: trustme.CA) -> AsyncIterator[tuple[str, FakeEngine]]:
    """The address of a replica that listens with TLS and a token, and its engine."""
    certificate = authority.issue_cert("localhost")
    pair = certificate.private_key_pem.bytes(), b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    with ThreadPoolExecutor(1) as thread:
        engine = FakeEngine(max_slots=4)
        loop = ReplicaLoop(engine, thread, max_waiting_samples=8)
        turns = asyncio.create_task(loop.run())
        listen_on = ListenOn(address="localhost:0", credentials=grpc.ssl_server_credentials([pair]), token=TOKEN)
        server, port = replica_server(loop, "remote", listen_on)
        await server.start()
        yield f"localhost:{port}", engine
        await server.stop(0)
        turns.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await turns


@pytest.fixture
async def remote(authority) -> AsyncIterator[str]:
    async with remote_replica(authority) as (target, _):
        yield target


def address_of(target: str, authority: trustme.CA, token: str | None = TOKEN) -> ReplicaAddress:
    return ReplicaAddress(target=target, credentials=trusting(authority), token=token)


def order() -> Order:
    resolved = ResolvedRequest(params=FakeEngine().capabilities.resolve(REQUEST.params, fallback_seed=0))
    return Order(
        request_id="r",
        request=resolved,
        client="c",
        left_s=None,
        traceparent=None,
        has_steps=False,
        on_step=lambda *_: None,
    )


async def test_it_works_like_one_on_a_socket(remote, authority):
    dispatcher = Dispatcher()
    address = address_of(remote, authority)
    assert TOKEN not in repr(address)
    info = await dispatcher.attach(address)
    assert (info.deployment_name, info.engine) == ("remote", "fake")
    call = CallContext(request_id="r", client="c")
    answer = await dispatcher.generate(REQUEST, call)
    assert [image.seed for image in answer.images] == [3]
    assert b'mii_serve_images_total{replica="0"} 1.0' in await dispatcher.metrics_text()
    assert (await dispatcher.server_info()).activity.num_images == 1
    await dispatcher.detach()


@pytest.mark.parametrize("token", [None, "", "another token"])
async def test_without_the_token_nothing_is_answered(remote, authority, token):
    dispatcher = Dispatcher()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await dispatcher.attach(address_of(remote, authority, token))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert not dispatcher.is_ready


class Relay:
    """A network between front and replica that can stop carrying anything, as when a machine disappears."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self.is_silent = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accept, "localhost", 0)
        return f"localhost:{self._server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        further_reader, further_writer = await asyncio.open_connection(self._host, self._port)
        self._writers += writer, further_writer
        for one, other in ((reader, further_writer), (further_reader, writer)):
            self._tasks.add(asyncio.create_task(self._carry(one, other)))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if not self.is_silent:
                writer.write(data)

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        for writer in self._writers:
            writer.close()
        closing = [writer.wait_closed() for writer in self._writers]
        await asyncio.gather(*self._tasks, *closing, return_exceptions=True)


async def test_a_machine_that_disappears_is_noticed_though_it_says_nothing(monkeypatch, authority):
    monkeypatch.setattr(replica_client, "KEEPALIVE_MS", 300)
    monkeypatch.setattr(service, "MIN_PING_INTERVAL_MS", 1)
    async with remote_replica(authority) as (target, engine):
        engine.gate.clear()
        relay = Relay(target)
        connection = ReplicaConnection(address_of(await relay.start(), authority))
        try:
            await connection.hello()
            events = connection.generate(order())
            await anext(events)
            await asyncio.sleep(1.0)
            assert not connection.is_broken, "pings are answered"
            relay.is_silent = True
            with pytest.raises(ReplicaLostError):
                async with asyncio.timeout(PATIENCE_S):
                    async for _ in events:
                        pass
        finally:
            engine.gate.set()
            await connection.close()
            await relay.close()


async def test_the_stream_of_orders_shows_the_token_too(remote, authority):
    connection = ReplicaConnection(address_of(remote, authority, "stale"))
    with pytest.raises(ReplicaLostError):
        async for _ in connection.generate(order()):
            pass
    await connection.close()

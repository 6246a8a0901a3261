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

from mii_serve.replica.loop import ReplicaLoop
from mii_serve.replica.service import ListenOn, replica_server
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


@pytest.fixture
async def remote(authority) -> AsyncIterator[str]:
    """The address of a replica that listens with TLS and a token."""
    certificate = authority.issue_cert("localhost")
    pair = certificate.private_key_pem.bytes(), b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    with ThreadPoolExecutor(1) as thread:
        loop = ReplicaLoop(FakeEngine(max_slots=4), thread, max_waiting_samples=8)
        turns = asyncio.create_task(loop.run())
        listen_on = ListenOn(address="localhost:0", credentials=grpc.ssl_server_credentials([pair]), token=TOKEN)
        server, port = replica_server(loop, "remote", listen_on)
        await server.start()
        yield f"localhost:{port}"
        await server.stop(0)
        turns.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await turns


async def test_it_works_like_one_on_a_socket(remote, authority):
    dispatcher = Dispatcher()
    address = ReplicaAddress(target=remote, credentials=trusting(authority), token=TOKEN)
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
        await dispatcher.attach(ReplicaAddress(target=remote, credentials=trusting(authority), token=token))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert not dispatcher.is_ready


async def test_the_stream_of_orders_shows_the_token_too(remote, authority):
    connection = ReplicaConnection(ReplicaAddress(target=remote, credentials=trusting(authority), token="stale"))
    resolved = ResolvedRequest(params=FakeEngine().capabilities.resolve(REQUEST.params, fallback_seed=0))
    order = Order(
        request_id="r",
        request=resolved,
        client="c",
        left_s=None,
        traceparent=None,
        has_steps=False,
        on_step=lambda *_: None,
    )
    with pytest.raises(ReplicaLostError):
        async for _ in connection.generate(order):
            pass
    await connection.close()

"""The front and a replica as they run on Ray Serve, without Ray: the replica over TLS, a proxy that does what Ray's does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx2
import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S

from mii_serve.client import AsyncClient
from mii_serve.config import DeployConfig
from mii_serve.errors import (
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    PermissionDeniedError,
    UnavailableError,
    UnsupportedError,
)
from mii_serve.proto.metadata import TIMEOUT_KEY
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationStub
from mii_serve.ray_serve import front as front_module
from mii_serve.ray_serve.front import FrontHost
from mii_serve.ray_serve.proxied import IS_STREAM, METHODS, add_to_server, method_of
from mii_serve.ray_serve.replica import ReplicaHost
from mii_serve.server.front import bind_tcp
from mii_serve.server.mii import MII_SERVICES, NOT_SERVED

LOOPBACK = "127.0.0.1"
CONFIG = DeployConfig(grpc_port=0, http_port=0, host=LOOPBACK, drain_timeout_s=PATIENCE_S)


class RayContext:
    """What Ray hands over: the proxy's context as it was when the call came, to be set on the real one with each message."""

    def __init__(self, context: Any, peer: str | None) -> None:
        self._peer = peer or context.peer()
        self._metadata = tuple(context.invocation_metadata())
        self._code, self._details, self._trailing = None, "", []

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self) -> Any:
        return self._metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code

    def set_details(self, details: str) -> None:
        self._details = details

    def set_trailing_metadata(self, metadata: list[Any]) -> None:
        self._trailing = [("request_id", "ray's"), *metadata]

    def set_on(self, context: Any) -> None:
        if self._code:
            context.set_code(self._code)
        if self._details:
            context.set_details(self._details)
        context.set_trailing_metadata(tuple(self._trailing))


class Proxy:
    """As Ray's: it has a method for every method that is registered, and sends on bytes."""

    def __init__(self, front: FrontHost) -> None:
        self.calls = front.calls
        self.peer: str | None = None
        self.timeouts: list[str | None] = []
        for name in IS_STREAM:
            setattr(self, name, self._stream(name) if IS_STREAM[name] else self._one(name))

    def _one(self, name: str) -> Any:
        async def call(wire: bytes, context: Any) -> bytes:
            ray_context = self._context(context)
            message = await method_of(name)(self, wire, grpc_context=ray_context)
            ray_context.set_on(context)
            return message.SerializeToString()

        return call

    def _stream(self, name: str) -> Any:
        async def call(wire: bytes, context: Any) -> AsyncIterator[bytes]:
            ray_context = self._context(context)
            async with contextlib.aclosing(method_of(name)(self, wire, grpc_context=ray_context)) as messages:
                async for message in messages:
                    ray_context.set_on(context)
                    yield message.SerializeToString()

        return call

    def _context(self, context: Any) -> RayContext:
        self.timeouts.append(dict(context.invocation_metadata()).get(TIMEOUT_KEY))
        return RayContext(context, self.peer)


@dataclass
class Application:
    front: FrontHost
    replica: ReplicaHost
    engine: FakeEngine
    proxy: Proxy
    target: str
    clients: list[AsyncClient] = field(default_factory=list)

    def client(self) -> AsyncClient:
        self.clients.append(AsyncClient(self.target, max_retries=0))
        return self.clients[-1]

    async def list(self) -> None:
        await self.front.update([self.replica.describe()], is_complete=True)


@pytest.fixture
async def application() -> AsyncIterator[Application]:
    engine = FakeEngine(max_slots=2)
    replica, front = ReplicaHost(CONFIG, LOOPBACK, build=lambda _: engine), FrontHost(CONFIG)
    server = grpc.aio.server()
    port = server.add_insecure_port(f"{LOOPBACK}:0")
    await front.start()
    application = Application(front, replica, engine, Proxy(front), f"{LOOPBACK}:{port}")
    add_to_server(application.proxy, server)
    await server.start()
    await replica.start()
    await application.list()
    await front.until_ready()
    await application.list()
    try:
        yield application
    finally:
        engine.gate.set()
        for client in application.clients:
            await client.close()
        await server.stop(0)
        await front.close()
        await replica.stop(PATIENCE_S)


def test_every_method_of_the_front_is_registered_with_the_proxy():
    service = pb.DESCRIPTOR.services_by_name["ImageGeneration"]
    assert METHODS[service.full_name] == {method.name: method.server_streaming for method in service.methods}
    answered = {"Txt2ImgReply", "Terminate", *NOT_SERVED}
    assert all(set(METHODS[name]) == answered for name in MII_SERVICES)


async def test_our_sdk_draws_streams_and_reads_typed_errors_through_the_proxy(application):
    client = application.client()
    await client.wait_ready(PATIENCE_S)
    assert await client.health() == "SERVING"
    drawn = await client.generate("a red circle", seed=5, timeout=PATIENCE_S)
    assert list(drawn.seeds) == [5]
    assert 0 < float(application.proxy.timeouts[-1]) <= PATIENCE_S
    async with client.stream("a red circle", seed=5) as stream:
        kinds = [type(event).__name__ async for event in stream]
    assert (kinds[:2], set(kinds[2:-2]), kinds[-2:]) == (["Queued", "Started"], {"Step"}, ["PictureReady", "Done"])
    with pytest.raises(InvalidRequestError) as caught:
        await client.generate("a", height=7)
    assert caught.value.field == "height"
    with pytest.raises(InvalidRequestError) as caught:
        async for _ in client.stream("a", num_inference_steps=0):
            pytest.fail("an error is all there is")
    assert caught.value.field == "num_inference_steps"


async def test_a_deadline_reaches_admission_though_the_proxy_keeps_it(application):
    application.engine.gate.clear()
    client = application.client()
    with pytest.raises(DeadlineExceededError):
        await client.generate("a red circle", timeout=0.2)
    async with grpc.aio.insecure_channel(application.target) as channel:
        call = ImageGenerationStub(channel).Generate(pb.GenerateRequest(prompt="p"), metadata=((TIMEOUT_KEY, "soon"),))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and TIMEOUT_KEY in caught.value.details()


async def test_a_caller_who_leaves_frees_their_slot(application):
    application.engine.gate.clear()
    async with application.client().stream("a red circle", num_inference_steps=50) as stream:
        await anext(stream)
    application.engine.gate.set()
    async with asyncio.timeout(PATIENCE_S):
        while (await application.client().server_info()).activity.num_cancelled_requests != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_while_the_front_is_for_this_machine_callers_elsewhere_are_refused(application):
    application.proxy.peer = "ipv4:10.9.8.7:1234"
    with pytest.raises(PermissionDeniedError):
        await application.client().generate("a red circle")
    for address, status in (("10.9.8.7", 403), (LOOPBACK, 200)):
        transport = httpx2.ASGITransport(app=application.front.http, client=(address, 1234))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:
            assert (await http.get("/readyz")).status_code == status


async def test_what_mii_asks_for_and_is_not_served_is_refused_by_name(application):
    async with grpc.aio.insecure_channel(application.target) as channel:
        call = channel.unary_unary("/legacymodelresponse.ModelResponse/FillMaskReply")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
    assert caught.value.code().name == UnsupportedError.grpc_code


async def test_an_own_port_that_is_in_use_is_opened_when_it_is_free(monkeypatch):
    monkeypatch.setattr(front_module, "RETRY_PORT_S", 0.02)
    taken = bind_tcp("grpc_port", LOOPBACK, 0)
    taken.listen()
    port = taken.getsockname()[1]
    front = FrontHost(CONFIG.model_copy(update={"grpc_port": port}))
    await front.start()
    try:
        await asyncio.sleep(0.1)
        taken.close()
        async with AsyncClient(f"{LOOPBACK}:{port}") as client, asyncio.timeout(PATIENCE_S):
            while True:
                with contextlib.suppress(UnavailableError):
                    assert await client.health(timeout=PATIENCE_S) == "NOT_SERVING"
                    break
                await asyncio.sleep(0.02)
    finally:
        await front.close()


async def test_a_replica_whose_engine_failed_says_so_and_is_let_go(application):
    application.engine.fail_next()
    asked = asyncio.create_task(application.client().generate("a red circle", timeout=PATIENCE_S))
    async with asyncio.timeout(PATIENCE_S):
        while application.replica.describe().failure is None:  # noqa: ASYNC110 - the loop ends by itself
            await asyncio.sleep(0.01)
    with pytest.raises(EngineError, match="told to fail"):
        application.replica.check()
    await application.list()
    engine = FakeEngine()
    second = ReplicaHost(CONFIG, LOOPBACK, build=lambda _: engine)
    await second.start()
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not asked.done():
                await application.front.update([second.describe()], is_complete=True)
                await asyncio.sleep(0.01)
        assert (await asked).images
    finally:
        await application.front.update([], is_complete=True)
        await application.front.update([], is_complete=True)
        await second.stop(PATIENCE_S)

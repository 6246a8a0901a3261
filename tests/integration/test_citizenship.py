"""Beside its own service: health, reflection, request ids, server info."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from mii_serve.errors import ConfigError
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.front import SERVICE_NAME, GrpcFront, bind_tcp


@pytest.mark.parametrize("name", ["", SERVICE_NAME])
async def test_health_follows_readiness(server, name):
    stub = health_pb2_grpc.HealthStub(server.channel)
    states = health_pb2.HealthCheckResponse
    assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == states.SERVING
    await server.front.set_serving(False)
    assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == states.NOT_SERVING


async def test_reflection_lists_the_service(server):
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = [answer async for answer in stub.ServerReflectionInfo(iter([asked]))]
    names = {service.name for service in answers[0].list_services_response.service}
    assert names >= {"mii_serve.v1.ImageGeneration", "grpc.health.v1.Health"}


async def test_a_callers_request_id_comes_back(server):
    call = server.stub.Generate(pb.GenerateRequest(prompt="p"), metadata=(("x-request-id", "mine-1"),))
    assert (await call).request_id == "mine-1"
    assert dict(await call.initial_metadata())["x-request-id"] == "mine-1"


@pytest.mark.parametrize("bad", ["a b", "x" * 101])
async def test_an_unusable_request_id_is_refused(server, bad):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.stub.Generate(pb.GenerateRequest(prompt="p"), metadata=(("x-request-id", bad),))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith("x-request-id: ")


async def test_one_id_may_have_several_requests_at_once(server):
    server.engine.gate.clear()
    metadata = (("x-request-id", "same"),)
    requests = [pb.GenerateRequest(prompt="p", seed=seed) for seed in range(3)]
    calls = [server.stub.Generate(request, metadata=metadata) for request in requests]
    await server.until(lambda: server.loop.activity().num_requests == 3)
    server.engine.gate.set()
    answers = [await call for call in calls]
    assert [(answer.request_id, answer.images[0].seed) for answer in answers] == [("same", 0), ("same", 1), ("same", 2)]
    assert [dict(await call.initial_metadata())["x-request-id"] for call in calls] == ["same"] * 3


@pytest.mark.parametrize("forged", ["victim 1", "victim 12", " ", "victim 1 1"])
async def test_ids_as_the_front_gives_them_are_not_for_callers(server, forged):
    with pytest.raises((grpc.aio.AioRpcError, ValueError)) as caught:
        await server.stub.Generate(pb.GenerateRequest(prompt="p"), metadata=(("x-request-id", forged),))
    if isinstance(caught.value, grpc.aio.AioRpcError):
        assert caught.value.details().startswith("x-request-id: ")
    assert server.loop.activity().num_requests == 0


async def test_server_info_tells_defaults_limits_and_schedulers(server):
    info = await server.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert (info.engine, info.model, info.deployment_name) == ("fake", "fake", "test")
    assert info.defaults.num_inference_steps == 4
    assert info.limits.max_images_per_prompt == 16
    assert info.schedulers["PNDMScheduler"] == "pndm"
    assert info.activity.max_slots == 1


async def test_a_front_without_a_replica_is_unavailable():
    front = GrpcFront(Dispatcher())
    port = await front.listen("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationStub

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ImageGenerationStub(channel).Generate(pb.GenerateRequest(prompt="p"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await front.stop(0)


async def test_a_port_in_use_is_a_config_error_that_names_it(server):
    port = int(server.target.rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=f"grpc_port.*{port}"):
        await GrpcFront(Dispatcher()).listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match=f"http_port.*{port}"):
        bind_tcp("http_port", "127.0.0.1", port)

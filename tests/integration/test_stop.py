"""A server that stops with requests still running: each caller is told so, whatever their request is waiting for."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import grpc
import pytest
from replicas import KILLED, Deployment, deployment_of, events_of, request

from mii_serve.errors import UnavailableError
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.server import idempotency
from mii_serve.server.replica_client import ReplicaAddress, ReplicaConnection


async def assert_told(call: asyncio.Task) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, "the server is stopping")


def called(deployment: Deployment, metadata: tuple = (), **fields) -> asyncio.Task:
    return asyncio.create_task(events_of(deployment.stub.GenerateStream(request(**fields), metadata=metadata)))


@pytest.mark.parametrize("num_images", [1, 4])
async def test_work_in_hand_and_in_line(tmp_path: Path, num_images: int):
    async with deployment_of(tmp_path, 2, max_slots=1) as deployment:
        deployment.hold()
        calls = [called(deployment, seed=seed, num_images_per_prompt=num_images) for seed in range(3)]
        await deployment.until(lambda: sum(deployment.images_on().values()) == 3 * num_images)
        deployment.dispatcher.stop()
        for call in calls:
            await assert_told(call)
        assert [(link.work, link.num_running) for link in deployment.router.replicas] == [(0, 0), (0, 0)]
        deployment.release()


async def test_a_request_that_waits_for_a_replica_to_come_back(tmp_path: Path):
    async with deployment_of(tmp_path, 1) as deployment:
        await deployment.lose(0, KILLED)
        deployment.router._patience_s = 60.0
        call = called(deployment)
        await deployment.until(lambda: deployment.router._waiting)
        deployment.dispatcher.stop()
        await assert_told(call)
        assert not deployment.router._waiting


async def test_all_who_wait_for_the_same_work(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(idempotency, "GRACE_S", 0.2)  # else the loop would stay open for the work that all have left
    async with deployment_of(tmp_path, 1) as deployment:
        deployment.hold()
        calls = [called(deployment, (("x-idempotency-key", "once"),)) for _ in range(3)]
        await deployment.until(lambda: len(deployment.dispatcher._waiting) == 3)
        await deployment.until(lambda: sum(deployment.images_on().values()) == 1)
        deployment.dispatcher.stop()
        for call in calls:
            await assert_told(call)
        deployment.release()


async def test_new_requests_are_refused(tmp_path: Path):
    async with deployment_of(tmp_path, 1) as deployment:
        deployment.dispatcher.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await deployment.stub.Generate(request())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_asking_a_replica_whose_connection_is_just_closed_is_unavailable_and_no_defect(tmp_path: Path):
    """A closed channel looks to its caller as if the call had been cancelled."""
    async with deployment_of(tmp_path, 1) as deployment:
        calls = [asyncio.create_task(deployment.dispatcher.server_info()) for _ in range(20)]
        texts = [asyncio.create_task(deployment.dispatcher.metrics_text()) for _ in range(20)]
        await asyncio.sleep(0)  # all of them have asked
        await deployment.dispatcher.detach(0, KILLED)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(outcome, pb.GetServerInfoResponse | UnavailableError) for outcome in outcomes), outcomes
        assert all(isinstance(text, bytes) for text in await asyncio.gather(*texts))


async def test_an_answer_that_is_waited_for_when_its_connection_is_closed_is_none(tmp_path: Path):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen()
        connection = ReplicaConnection(ReplicaAddress.socket(tmp_path / "s"))
        asked = [asyncio.create_task(call) for call in (connection.info(60), connection.metrics(60))]
        await asyncio.sleep(0.1)  # until they wait
        await connection.channel.close()
        assert await asyncio.gather(*asked) == [None, None]


async def test_a_caller_who_leaves_while_a_replica_is_asked_has_left(tmp_path: Path):
    async with deployment_of(tmp_path, 1) as deployment:
        asked = asyncio.create_task(deployment.router.replicas[0].connection.info(60))
        await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked

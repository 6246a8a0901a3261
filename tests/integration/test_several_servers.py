"""A client of several servers, as behind a headless service, and connections that end so that it sees new ones."""

from __future__ import annotations

import asyncio

import grpc
from fake_engine import FakeEngine
from patience import PATIENCE_S
from servers import running_server

from mii_serve.client import AsyncClient
from mii_serve.client.calls import channel_options


async def test_calls_take_turns_between_the_servers_of_a_target(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with (
        running_server(tmp_path / "a", FakeEngine()) as one,
        running_server(tmp_path / "b", FakeEngine()) as other,
        AsyncClient(f"ipv4:{one.target},{other.target}") as client,
    ):
        async with asyncio.timeout(PATIENCE_S):
            while not (one.engine.plans and other.engine.plans):  # until the slower connection stands
                await client.generate("x", num_inference_steps=1)
        before = len(one.engine.plans), len(other.engine.plans)
        await asyncio.gather(*(client.generate("x", num_inference_steps=1) for _ in range(4)))
        assert len(one.engine.plans) > before[0] and len(other.engine.plans) > before[1]


async def test_a_lost_server_is_passed_over(tmp_path):
    async with running_server(tmp_path, FakeEngine()) as server, AsyncClient(f"ipv4:{server.target},127.0.0.1:1") as client:
        for _ in range(4):
            assert len((await client.generate("x", num_inference_steps=1)).images) == 1


async def test_an_old_connection_ends_and_its_calls_do_not(tmp_path):
    engine = FakeEngine()
    engine.gate.clear()
    async with running_server(tmp_path, engine, max_connection_age_s=1) as server:
        channel = grpc.aio.insecure_channel(server.target, options=channel_options(server.target))
        async with AsyncClient(server.target) as client, asyncio.timeout(PATIENCE_S):
            running = asyncio.create_task(client.generate("x", num_inference_steps=2))
            await channel.channel_ready()
            while (state := channel.get_state()) is grpc.ChannelConnectivity.READY:
                await channel.wait_for_state_change(state)
            engine.gate.set()
            assert len((await running).images) == 1
        await channel.close()

"""Many connections to either port: bounded, and no number of them silences the probes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import stat
from pathlib import Path

import grpc
import httpx2
import pytest
from fake_engine import FakeEngine
from grpc_health.v1 import health_pb2, health_pb2_grpc
from servers import running_server
from web import Web

from mii_serve.config import DeployConfig
from mii_serve.gateway.app import serve_http
from mii_serve.gateway.listener import NUM_CLOSING, NUM_IDLE, BoundedListener, ConnectionPool
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.front import GrpcFront, bind_tcp
from mii_serve.server.keys import KeyRing

NUM_IN_WORK = 8
MOST = NUM_IDLE + NUM_IN_WORK
PROBES = ("/livez", "/readyz", "/", "/metrics")
UNREAD_PROBES = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000
"""More than the buffers of both ends hold of the answers."""
OPEN_BODY = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"


@pytest.fixture
async def small(tmp_path):
    """A server that takes few connections."""
    async with (
        running_server(tmp_path, FakeEngine(), max_waiting_samples=256) as server,
        serve_http(DeployConfig.load({"http_port": 0}), server.dispatcher, KeyRing(), max_connections=MOST) as address,
        httpx2.AsyncClient(base_url=f"http://{address}", timeout=20.0) as client,
    ):
        yield Web(server, client, address)


async def probed(small) -> list[int]:
    """Each over a connection of its own."""
    found = []
    for path in PROBES:
        async with httpx2.AsyncClient(base_url=f"http://{small.address}", timeout=20.0) as client:
            found.append((await client.get(path)).status_code)
    return found


@contextlib.asynccontextmanager
async def opened(small, count: int, raw: bytes):
    host, _, port = small.address.rpartition(":")
    connections = []
    for _ in range(count):
        connections.append(await asyncio.open_connection(host, int(port)))
        connections[-1][1].write(raw)
    try:
        yield connections
    finally:
        for _, writer in connections:
            writer.close()


def num_server_sockets() -> int:
    """Sockets of this process that have a peer; half of them are the server's."""
    found = 0
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(file.name)).st_mode):
                with socket.socket(fileno=os.dup(int(file.name))) as one:
                    if one.family == socket.AF_INET:
                        one.getpeername()
                        found += 1
    return found


@pytest.mark.parametrize(
    "raw",
    [UNREAD_PROBES, b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", OPEN_BODY, b"\x16\x03\x01"],
    ids=["unread probes", "nothing", "half a head", "kept alive", "half a body", "TLS"],
)
async def test_idle_ones_make_room_for_others(small, raw):
    before = num_server_sockets()
    async with opened(small, 10 * MOST, raw):
        assert await probed(small) == [200] * len(PROBES)
        assert num_server_sockets() - before <= 10 * MOST + MOST + NUM_CLOSING
    assert (await small.post("/score", {"input_data": {"columns": ["prompt"], "data": ["a"]}})).status_code == 200


async def test_requests_whose_bodies_do_not_come_keep_nobody_from_working(small):
    async with opened(small, 10 * MOST, OPEN_BODY):
        assert (await small.post("/", {"inputs": "a"})).status_code == 200


async def test_work_beyond_the_bound_is_refused_and_probes_are_not(small):
    small.server.engine.gate.clear()
    calls = [asyncio.create_task(small.post("/", {"inputs": "a"})) for _ in range(NUM_IN_WORK)]
    await small.server.until(lambda: small.server.loop.activity().num_requests == NUM_IN_WORK)
    for path, body in (("/", {"inputs": "a"}), ("/v1/images/generations", {"prompt": "a"}), ("/score", {})):
        refused = await small.post(path, body)
        assert refused.status_code == 503 and "in work" in str(refused.json()["error"])
    assert await probed(small) == [200] * len(PROBES)
    async with opened(small, 10 * MOST, b""):
        assert await probed(small) == [200] * len(PROBES)
    small.server.engine.gate.set()
    assert {call.status_code for call in await asyncio.gather(*calls)} == {200}, "no request in work lost its connection"
    assert (await small.post("/", {"inputs": "a"})).status_code == 200


async def test_the_one_that_has_been_idle_longest_goes_first(small):
    async with opened(small, MOST - 1, b"") as connections:
        kept_reader, kept_writer = connections[0]
        kept_writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in await kept_reader.readline()
        await kept_reader.readuntil(b"ok")
        async with opened(small, 3, b""):
            assert await connections[1][0].read() == b""
            kept_writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in await kept_reader.readline()


def test_a_lack_of_files_ends_nothing_and_is_told_once(caplog):
    listener = BoundedListener.of(bind_tcp("http_port", "127.0.0.1", 0), ConnectionPool(1000))
    listener.listen()
    listener.setblocking(False)
    callers = [socket.create_connection(listener.getsockname()) for _ in range(20)]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    filler = [os.open(os.devnull, os.O_RDONLY) for _ in range(32)]  # so that no number below the limit is free
    caplog.set_level(logging.WARNING)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(filler) + 1, before[1]))
    try:
        for _ in range(20):
            with pytest.raises(BlockingIOError):
                listener.accept()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for number in filler:
            os.close(number)
    for caller in callers:
        assert caller.recv(1) == b"", "no connection is left waiting"
        caller.close()
    assert [record.message for record in caplog.records] == ["no file is left for a new connection (ulimit -n)"]
    late = socket.create_connection(listener.getsockname())
    accepted, _ = listener.accept()
    for one in (late, accepted, listener):
        one.close()


async def test_grpc_takes_no_more_than_its_bound_and_again_as_soon_as_one_goes():
    front = GrpcFront(Dispatcher(), max_connections=4)
    port = await front.listen("127.0.0.1", 0)
    settings = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
    callers = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
    for _, writer in callers:
        writer.write(settings)

    async def is_taken(reader: asyncio.StreamReader) -> bool:
        with contextlib.suppress(ConnectionError):
            return bool(await reader.read(9))  # the server's settings, or the end
        return False

    async with asyncio.timeout(20):
        assert sum(await asyncio.gather(*(is_taken(reader) for reader, _ in callers))) == 4
    for _, writer in callers:
        writer.close()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            answer = await check(health_pb2.HealthCheckRequest(), timeout=20, wait_for_ready=True)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    finally:
        await front.stop(0)

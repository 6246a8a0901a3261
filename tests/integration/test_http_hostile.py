"""Callers over HTTP who send slowly, take in slowly, or send what is no request: bounded, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from patience import PATIENCE_S
from web import web

from mii_serve.gateway import app, json_body, middleware, protocol
from mii_serve.gateway.dialects import openai

HEAD = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"


@pytest.fixture
async def served(tmp_path):
    async with web(tmp_path) as running:
        yield running


async def connected(served, raw: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = served.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(raw)
    await writer.drain()
    return reader, writer


async def test_a_body_that_trickles_in_is_given_up(served, monkeypatch):
    monkeypatch.setattr(json_body, "BODY_TIMEOUT_S", 0.2)
    reader, writer = await connected(served, HEAD + b"{")
    async with asyncio.timeout(PATIENCE_S):
        assert b"400 Bad Request" in await reader.readline()
    writer.close()


async def test_a_head_that_never_ends_or_begins_is_given_up(served, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.2)
    whole = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for raw in (b"", b"GET /livez HT", whole + b"GET /livez HTTP/1.1\r\nx: "):
        reader, writer = await connected(served, raw)
        async with asyncio.timeout(PATIENCE_S):
            answer = await reader.read()
        assert answer.count(b"200 OK") == (1 if raw.startswith(whole) else 0)
        writer.close()
    served.server.engine.gate.clear()
    reader, writer = await served.start("/", {"inputs": "a"})
    await asyncio.sleep(5 * protocol.HEAD_TIMEOUT_S)
    served.server.engine.gate.set()
    async with asyncio.timeout(PATIENCE_S):
        assert b"200 OK" in await reader.readline(), "a long answer is no head that is waited for"
    writer.close()


@pytest.mark.slow
async def test_who_takes_in_no_answer_is_cut_off(served, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.1)
    _, writer = await connected(served, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3000)
    writer.transport.pause_reading()
    async with asyncio.timeout(PATIENCE_S):
        with contextlib.suppress(ConnectionError):
            while True:  # the server takes nothing more, and then is gone
                writer.write(b"\r\n")
                await writer.drain()
                await asyncio.sleep(0.05)
                if writer.transport.is_closing():
                    break
    writer.close()


async def test_who_leaves_in_the_middle_of_a_body_is_forgotten(served):
    _, writer = await connected(served, HEAD + b"{")
    writer.close()
    await served.server.until(
        lambda: served.server.dispatcher.metrics.requests.labels("POST /score", "CANCELLED")._value.get() == 1,
    )


async def test_a_reader_who_takes_in_nothing_is_given_up(served, monkeypatch):
    monkeypatch.setattr(middleware, "SEND_TIMEOUT_S", 0.2)
    monkeypatch.setattr(openai, "_event", lambda name, value: b"x" * 20_000_000)  # more than the sockets' buffers hold
    body = {"prompt": "a", "stream": True, "partial_images": 3, "num_inference_steps": 20}
    _, writer = await served.start("/v1/images/generations", body)
    ended = served.server.dispatcher.metrics.requests.labels("POST /v1/images/generations", "CANCELLED")
    await served.server.until(lambda: ended._value.get() == 1)
    await served.until_idle()
    writer.close()


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"\r\n" * 100,
    ],
    ids=["TLS", "a version", "a length", "nothing"],
)
async def test_what_is_no_request_harms_nobody(served, raw):
    _, writer = await connected(served, raw)
    assert (await served.client.get("/livez")).text == "ok"
    writer.close()


async def test_a_head_without_end_is_cut_off(served):
    reader, writer = await connected(served, b"GET /livez HTTP/1.1\r\nx-long: ")
    with contextlib.suppress(ConnectionError):
        for _ in range(64):
            writer.write(b"x" * 65536)
            await writer.drain()
    async with asyncio.timeout(PATIENCE_S):
        with contextlib.suppress(ConnectionError):
            assert b"400" in await reader.readline()
    writer.close()


@pytest.mark.parametrize("where", ["header", "headers", "target"])
@pytest.mark.parametrize("excess", [-1024, 1024])
async def test_a_head_may_have_64_kib_however_it_comes(served, where, excess):
    room = protocol.MAX_HEAD_BYTES + excess
    parts = {
        "header": (b"", b"x: " + b"x" * room),
        "headers": (b"", b"\r\n".join([b"x: " + b"x" * 996] * (room // 1001))),
        "target": (b"?" + b"x" * room, b"x: x"),
    }
    query, headers = parts[where]
    head = b"GET /livez" + query + b" HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n\r\n"
    reader, writer = await connected(served, head)
    async with asyncio.timeout(PATIENCE_S):
        assert (b"200" if excess < 0 else b"400") in await reader.readline()
    writer.close()
    reader, writer = await connected(served, HEAD.replace(b"Length: 100", b"Length: 2") + b"{}" + head)
    async with asyncio.timeout(PATIENCE_S):
        answers = await reader.readuntil(b"ok" if excess < 0 else b"Invalid HTTP request received.")
    assert answers.startswith(b"HTTP/1.1 400"), "what was asked before it is answered"
    writer.close()


async def test_probes_answer_while_the_server_is_full(served):
    served.server.engine.gate.clear()
    body = {"input_data": {"columns": ["prompt"], "data": ["a"] * 60}}
    calls = [asyncio.create_task(served.post("/score", body)) for _ in range(4)]
    await served.server.until(lambda: served.server.loop.activity().num_requests == 240)  # a later one might be refused
    for path in ("/livez", "/readyz", "/", "/metrics"):
        assert (await served.client.get(path)).status_code == 200
    assert not any(call.done() for call in calls), "nothing was finished meanwhile"
    served.server.engine.gate.set()
    assert {call.status_code for call in await asyncio.gather(*calls)} == {200}


async def test_the_end_waits_for_no_slow_caller(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "GRACE_S", 1)
    monkeypatch.setattr(json_body, "BODY_TIMEOUT_S", 10 * PATIENCE_S)
    async with asyncio.timeout(PATIENCE_S), web(tmp_path) as served:
        _, writer = await connected(served, HEAD + b"{")
        await served.client.get("/livez")
    writer.close()

"""Callers over gRPC who take in nothing: given up after a while, with everything that was kept for them."""

from __future__ import annotations

import asyncio
import contextlib
import struct

import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from servers import RunningServer, running_server

from mii_serve.proto.mii_codec import encode_mii_request
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.server import bounded_write

DATA, HEADERS, SETTINGS = 0, 1, 4
END_HEADERS, END_STREAM, INITIAL_WINDOW_SIZE = 4, 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """https://www.rfc-editor.org/rfc/rfc9113#name-frame-format"""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def text(value: str) -> bytes:
    assert len(value) < 127
    return bytes([len(value)]) + value.encode()


async def call_unread(server: RunningServer, method: str, message: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A call over a connection of its own that never widens its window of a few bytes."""
    host, _, port = server.target.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    block = b"".join(b"\x00" + text(name) + text(value) for name, value in headers.items())  # literals, not indexed
    writer.write(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 16))
        + frame(HEADERS, END_HEADERS, 1, block)
        + frame(DATA, END_STREAM, 1, b"\x00" + struct.pack(">I", len(message)) + message)
    )
    await writer.drain()
    return reader, writer


def num_open_files() -> int:
    return len(list(bounded_write.OPEN_FILES.iterdir()))


BIG = {"prompt": "a", "height": 512, "width": 512, "num_images_per_prompt": 4}
RAW = pb.OutputOptions(format=pb.IMAGE_FORMAT_RAW_RGB)
CALLS = {
    "GenerateStream": ("/mii_serve.v1.ImageGeneration/GenerateStream", pb.GenerateRequest(output=RAW, **BIG)),
    "Generate": ("/mii_serve.v1.ImageGeneration/Generate", pb.GenerateRequest(output=RAW, **BIG)),
    "Txt2ImgReply": (
        "/legacymodelresponse.ModelResponse/Txt2ImgReply",
        encode_mii_request(["a", "b"], [], {"height": 512, "width": 512}),
    ),
}


@pytest.fixture
async def impatient(tmp_path, monkeypatch):
    monkeypatch.setattr(bounded_write, "WRITE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(bounded_write, "ABORT_TIMEOUT_S", 0.1)
    async with running_server(tmp_path, FakeEngine(max_slots=8), max_waiting_samples=64) as running:
        yield running


@pytest.mark.parametrize("name", CALLS)
async def test_who_takes_in_nothing_is_given_up_and_hung_up_on(impatient, name):
    method, message = CALLS[name]
    await impatient.stub.GetServerInfo(pb.GetServerInfoRequest())
    before = num_open_files()
    callers = [await call_unread(impatient, method, message.SerializeToString()) for _ in range(3)]
    ended = impatient.dispatcher.metrics.requests.labels(name, "CANCELLED")
    await impatient.until(lambda: ended._value.get() == 3)
    await impatient.until(lambda: not impatient.dispatcher._active and not impatient.loop._generations)
    async with asyncio.timeout(PATIENCE_S):
        for reader, writer in callers:
            with contextlib.suppress(ConnectionError):
                received = await reader.read()  # to the end, which there is only when the server has hung up
                assert len(received) < 10_000
            writer.close()
    await impatient.until(lambda: num_open_files() <= before)
    assert (await impatient.stub.Generate(pb.GenerateRequest(prompt="a"))).images, "others are served as before"


async def test_who_reads_slowly_but_reads_is_served_to_the_end(impatient, monkeypatch):
    monkeypatch.setattr(
        bounded_write, "WRITE_TIMEOUT_S", PATIENCE_S
    )  # for one write, which a loaded machine may take a while for
    call = impatient.stub.GenerateStream(pb.GenerateRequest(output=RAW, **{**BIG, "num_images_per_prompt": 16}))
    kinds = []
    async for event in call:
        kinds.append(event.WhichOneof("event"))
        await asyncio.sleep(0.01)
    assert kinds.count("image") == 16 and kinds[-1] == "done"


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        ("ipv4:10.1.2.3:5000", "10.1.2.3"),
        ("ipv6:%5B::1%5D:5000", "::1"),
        ("ipv6:[2001:db8:1:2:3:4:5:6]:1", "2001:db8:1:2::"),
        ("ipv6:[2001:db8:1:2:ffff::1]:2", "2001:db8:1:2::"),
        ("ipv6:[::ffff:10.1.2.3]:2", "10.1.2.3"),
        ("ipv6:[fe80::1%eth0]:2", "fe80::"),
        ("unix:/tmp/a.sock", "unix:/tmp/a.sock"),
    ],
)
def test_callers_are_told_apart_by_their_network(peer, network):
    assert bounded_write.address_of(peer) == network

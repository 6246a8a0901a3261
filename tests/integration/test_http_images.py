"""Images over HTTP, whatever the dialect: one decoder for all, bodies that never end, callers who leave."""

from __future__ import annotations

import asyncio
import base64
import re

import pytest
from image_files import GOOD, REFUSED
from patience import PATIENCE_S
from web import Web, web

from mii_serve.gateway import multipart

EDITS, VARIATIONS = "/v1/images/edits", "/v1/images/variations"
FORM = (
    b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 100000\r\n\r\n"
    b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\nhalf of a file'
)


@pytest.fixture
async def served(tmp_path):
    async with web(tmp_path) as running:
        yield running


async def begun(served: Web, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = served.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(FORM % path.encode())
    await writer.drain()
    return reader, writer


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
async def test_every_malformed_image_is_refused_by_its_field_in_every_dialect(served):
    for name, (file, rule) in REFUSED.items():
        text = base64.b64encode(file).decode()
        answers = {
            "image": await served.client.post(VARIATIONS, files={"image": ("a.png", file, "image/png")}),
            "inputs": await served.post("/", {"inputs": text, "parameters": {"prompt": "a"}}),
            "the whole body": await served.client.post("/", content=file, headers={"content-type": "image/png"}),
        }
        for where, answer in answers.items():
            if len(file) > 8 * 1024 * 1024 and answer.status_code == 413:
                continue  # the body's own bound comes first
            assert answer.status_code == 400, (name, where, answer.text)
            said = answer.json()["error"] if where != "image" else answer.json()["error"]["message"]
            if name != "nothing":
                assert re.match("image: " if where == "image" else "inputs: ", said) and re.search(rule, said), (name, said)
    assert served.server.loop.activity().num_requests == 0
    assert (await served.client.post(VARIATIONS, files={"image": ("a.jpg", GOOD, "image/jpeg")})).status_code == 200


async def test_a_form_that_trickles_in_is_given_up(served, monkeypatch):
    monkeypatch.setattr(multipart, "FORM_TIMEOUT_S", 0.2)
    reader, writer = await begun(served, VARIATIONS)
    async with asyncio.timeout(PATIENCE_S):
        assert b"400 Bad Request" in await reader.readline()
    writer.close()


@pytest.mark.parametrize("path", [EDITS, VARIATIONS])
async def test_who_leaves_in_the_middle_of_an_image_is_forgotten(served, path):
    _, writer = await begun(served, path)
    writer.close()
    cancelled = served.server.dispatcher.metrics.requests.labels(f"POST {path}", "CANCELLED")
    await served.server.until(lambda: cancelled._value.get() == 1)
    await served.until_idle()
    assert served.server.dispatcher._input_images._num_held_bytes == 0

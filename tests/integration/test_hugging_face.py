"""Hugging Face's text-to-image task, by the real `InferenceClient`."""

from __future__ import annotations

import asyncio
import io

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from web import web


@pytest.fixture
async def served(tmp_path):
    async with web(tmp_path) as running:
        yield running


async def test_the_client_draws(served):
    for path in ("", "/models/fake"):
        client = InferenceClient(model=f"http://{served.address}{path}", provider="hf-inference", token="unused")
        settings = {
            "negative_prompt": "x",
            "height": 128,
            "width": 64,
            "num_inference_steps": 3,
            "guidance_scale": 2.0,
            "seed": 4,
        }
        image = await asyncio.to_thread(client.text_to_image, "a horse", scheduler="pndm", **settings)
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 128))


async def test_the_client_understands_a_refusal(served):
    client = InferenceClient(model=f"http://{served.address}", provider="hf-inference", token="unused")
    with pytest.raises(HfHubHTTPError, match=r"parameters\.height: must be a multiple of 8") as caught:
        await asyncio.to_thread(client.text_to_image, "a", height=99)
    assert caught.value.response.status_code == 400


async def test_the_picture_is_of_the_kind_that_was_accepted(served):
    for accept, wanted in (
        ("image/jpeg", "JPEG"),
        ("image/webp, image/png;q=0.5", "WEBP"),
        ("text/html, */*;q=0.1", "PNG"),
        ("image/*", "PNG"),
        ("", "PNG"),
    ):
        answer = await served.post("/", {"inputs": "a skull", "parameters": {"seed": 3}}, accept=accept)
        assert answer.status_code == 200
        image = Image.open(io.BytesIO(answer.content))
        assert (image.format, answer.headers["content-type"]) == (wanted, f"image/{wanted.lower()}")
        assert (answer.headers["x-mii-seed"], answer.headers["x-mii-nsfw-content-detected"]) == ("3", "true")
    assert (await served.post("/", {"inputs": "a"}, accept="application/json")).status_code == 406
    assert (await served.post("/", {"inputs": "a"}, accept="image/png;q=0")).status_code == 406


async def test_refusals_name_the_member(served):
    for body, name in (
        ({}, "inputs"),
        ({"inputs": ["a"]}, "inputs"),
        ({"inputs": ""}, "inputs"),
        ({"inputs": "a", "parameters": 1}, "parameters"),
        ({"inputs": "a", "parameters": {"steps": 1}}, "parameters.steps"),
        ({"inputs": "a", "parameters": {"seed": "1"}}, "parameters.seed"),
        ({"inputs": "a", "options": {"x": 1}}, "options.x"),
        ({"inputs": "a", "stream": True}, "stream"),
    ):
        answer = await served.post("/", body)
        assert answer.status_code == 400 and answer.json()["error"].startswith(f"{name}: "), (body, answer.text)
    assert (await served.post("/models/other", {"inputs": "a"})).status_code == 404
    assert (await served.client.get("/")).json() == "healthy"
    assert served.server.loop.activity().num_images == 0


async def test_who_hangs_up_frees_the_slot(served):
    served.server.engine.gate.clear()
    _, writer = await served.start("/", {"inputs": "a", "parameters": {"num_inference_steps": 1000}})
    await served.server.until(lambda: served.server.loop.activity().num_running)
    writer.close()
    await served.server.until(lambda: served.server.loop.activity().num_cancelled_requests == 1)
    served.server.engine.gate.set()
    await served.until_idle()
    assert served.server.loop.activity().num_images == 0

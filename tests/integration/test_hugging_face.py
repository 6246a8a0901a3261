"""Hugging Face's tasks, by the real `InferenceClient`."""

from __future__ import annotations

import asyncio
import base64
import io

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from web import Web, web

IMAGE = Image.effect_noise((96, 64), 60).convert("RGB")


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


# ---- image-to-image ----------------------------------------------------------------------------------------------


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def text(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


def joined(served: Web) -> list:
    return [sample for plan in served.server.engine.plans for sample in plan.joins]


async def test_the_client_starts_from_an_image(served):
    client = InferenceClient(model=f"http://{served.address}/models/fake", provider="hf-inference", token="unused")
    settings = {"num_inference_steps": 6, "guidance_scale": 2.0, "negative_prompt": "x", "strength": 0.5, "seed": 4}
    size = {"width": 64, "height": 128}
    made = await asyncio.to_thread(client.image_to_image, png(IMAGE), "a horse", target_size=size, **settings)
    assert (made.format, made.size) == ("PNG", (64, 128))
    alone = await asyncio.to_thread(client.image_to_image, png(IMAGE))  # sent as it is
    assert alone.size == (96, 64)
    first, second = joined(served)
    assert (first.params.prompt, first.params.strength, first.params.num_steps, first.params.seed) == ("a horse", 0.5, 3, 4)
    assert first.input_image.rgb == IMAGE.resize((64, 128), Image.Resampling.LANCZOS).tobytes()
    assert (second.params.prompt, second.params.strength, second.input_image.rgb) == ("", 0.8, IMAGE.tobytes())


async def test_a_mask_and_a_prompt_come_beside_the_image(served):
    mask = Image.new("L", IMAGE.size, 255)
    parameters = {"prompt": "a", "mask_image": text(mask)}
    assert (await served.post("/", {"inputs": text(IMAGE), "parameters": parameters})).status_code == 200
    assert (await served.post("/", {"inputs": f"data:image/png;base64,{text(IMAGE)}"})).status_code == 200
    first, second = joined(served)
    assert (first.input_image.mask, second.input_image.mask) == (mask.tobytes(), None)


async def test_refusals_of_an_image_name_the_member(served):
    for parameters, name in (
        ({"strength": 2}, "parameters.strength"),
        ({"prompt": "a", "mask_image": text(IMAGE.resize((64, 64)))}, "parameters.mask_image"),
        ({"prompt": "a", "mask_image": "!"}, "parameters.mask_image"),
        ({"prompt": "a" * 4097}, "parameters.prompt"),
        ({"target_size": {"width": 64}}, "parameters.target_size.height"),
        ({"target_size": {"width": 64, "height": 64}, "width": 64}, "parameters.target_size"),
        ({"target_size": {"width": 63, "height": 64}}, "parameters.width"),
    ):
        answer = await served.post("/", {"inputs": text(IMAGE), "parameters": parameters})
        assert answer.status_code == 400 and answer.json()["error"].startswith(f"{name}: "), (parameters, answer.text)
    answer = await served.post("/", {"inputs": "a horse", "parameters": {"strength": 0.5}})
    assert answer.json()["error"].startswith("inputs: must be the file of an image in base64")


async def test_a_body_may_be_large_only_because_of_its_images(served):
    noise = Image.effect_noise((1600, 1600), 90).convert("RGB")
    body = {"inputs": text(noise), "parameters": {"prompt": "a", "width": 64, "height": 64}}
    assert len(body["inputs"]) > 4 * 1024 * 1024
    assert (await served.post("/", body)).status_code == 200
    many = await served.post("/", {"inputs": "a", "parameters": {"prompt": [0] * 3_000_000}})
    assert many.status_code == 413

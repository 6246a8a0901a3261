"""OpenAI's image edits and variations over a real socket: forms, masks, refusals by name."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from web import picture, web

from mii_serve.gateway.dialects.openai_edits import VARIATION_STRENGTH

PATH = "/v1/images/edits"
IMAGE = Image.effect_noise((96, 64), 60).convert("RGB")


@pytest.fixture
async def served(tmp_path):
    async with web(tmp_path) as running:
        yield running


def png(image: Image.Image) -> tuple[str, bytes, str]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "image.png", file.getvalue(), "image/png"


def with_hole(image: Image.Image) -> Image.Image:
    """Its left half transparent."""
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, image.width // 2, image.height))
    image = image.convert("RGBA")
    image.putalpha(alpha)
    return image


async def edit(served, fields: dict[str, str], path: str = PATH, **files: tuple[str, bytes, str]):
    return await served.client.post(path, data={"prompt": "a", **fields}, files=files)


def joined(served):
    return [sample for plan in served.server.engine.plans for sample in plan.joins]


REPAINTED = bytes(([255] * 48 + [0] * 48) * 64)


async def test_an_image_alone_is_the_start_of_others(served):
    answer = await edit(served, {"n": "2", "seed": "5", "strength": "0.5", "num_inference_steps": "6"}, image=png(IMAGE))
    assert answer.status_code == 200, answer.text
    assert [item["seed"] for item in answer.json()["data"]] == [5, 6]
    assert picture(answer.json()["data"][0]["b64_json"]).size == (96, 64)
    first, second = joined(served)
    assert first.input_image.rgb == second.input_image.rgb == IMAGE.tobytes()
    assert (first.input_image.mask, first.params.strength, first.params.num_steps) == (None, 0.5, 3)


async def test_what_is_transparent_is_repainted(served):
    fields = {"size": "96x64", "response_format": "b64_json"}
    for files in (
        {"image": png(IMAGE), "mask": png(with_hole(Image.new("RGB", IMAGE.size)))},
        {"image[]": png(with_hole(IMAGE))},
    ):
        answer = await edit(served, fields, "/openai/deployments/fake/images/edits", **files)
        assert answer.status_code == 200, answer.text
        sample = joined(served)[-1]
        assert (sample.input_image.mask, sample.params.strength) == (REPAINTED, 1.0)
        assert sample.input_image.rgb == IMAGE.tobytes()


async def test_what_is_refused_is_named_as_the_api_names_it(served):
    refused = [
        ({}, {"image": ("x", b"no image", "image/png")}, "image"),
        ({}, {"mask": png(IMAGE)}, "image"),
        ({}, {"image": png(IMAGE), "mask": png(IMAGE)}, "mask"),
        ({}, {"image": png(IMAGE), "mask": png(with_hole(IMAGE.resize((64, 64))))}, "mask"),
        ({"strength": "2"}, {"image": png(IMAGE)}, "strength"),
        ({"n": "two"}, {"image": png(IMAGE)}, "n"),
        ({"steps": "2"}, {"image": png(IMAGE)}, "steps"),
        ({"stream": "true"}, {"image": png(IMAGE)}, "stream"),
        ({"size": "99x64"}, {"image": png(IMAGE)}, "size"),
        ({"size": "auto"}, {"other": png(IMAGE)}, "other"),
    ]
    for fields, files, param in refused:
        answer = await edit(served, fields, **files)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert (await served.client.post(PATH, json={"prompt": "a"})).status_code == 415
    twice = [("image[]", png(IMAGE)), ("image[]", png(IMAGE))]
    answer = await served.client.post(PATH, data={"prompt": "a"}, files=twice)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "image: must come once")
    answer = await edit(served, {}, image=("x.png", bytes(10 * 1024 * 1024), "image/png"))
    assert answer.status_code == 413
    assert served.server.loop.activity().num_requests == 0


async def test_a_variation_has_no_prompt_and_keeps_more_of_the_image(served):
    path = "/v1/images/variations"
    answer = await served.client.post(path, data={"n": "2", "user": "u", "size": "64x64"}, files={"image": png(IMAGE)})
    assert answer.status_code == 200, answer.text
    assert len({item["seed"] for item in answer.json()["data"]}) == 2
    for sample in joined(served):
        assert (sample.params.prompt, sample.params.strength, sample.params.is_guided) == ("", VARIATION_STRENGTH, False)
        assert sample.input_image.rgb == IMAGE.resize((64, 64), Image.Resampling.LANCZOS).tobytes()
    more = {"strength": "0.9", "guidance_scale": "3", "negative_prompt": "x"}
    assert (await served.client.post(path, data=more, files={"image": png(IMAGE)})).status_code == 200
    assert (joined(served)[-1].params.strength, joined(served)[-1].params.guidance_scale) == (0.9, 3.0)
    for fields, files, param in (
        ({"prompt": "a"}, {"image": png(IMAGE)}, "prompt"),
        ({}, {"image": png(IMAGE), "mask": png(IMAGE)}, "mask"),
        ({}, {"image": png(with_hole(IMAGE))}, "image"),
        ({"n": "1"}, {}, "image"),
    ):
        answer = await served.client.post(path, data=fields, files=files or {"other": png(IMAGE)})
        refused = answer.json()["error"]["param"]
        assert (answer.status_code, refused) == (400, param if files else "other"), answer.text

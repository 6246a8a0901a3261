"""AUTOMATIC1111's API over a real socket: what its clients send, what they read, and what nobody may do to others."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from outside import run_client
from patience import PATIENCE_S
from PIL import Image
from servers import Turnstile
from web import Web, client_from, picture, web

from mii_serve.server.keys import KeyRing
from mii_serve.types import Capabilities, LoraInfo

ROOT = "/sdapi/v1"
KEY, OTHER_KEY = "studio-key-0123456789", "garden-key-0123456789"
ASK = {"prompt": "a", "steps": 4, "width": 64, "height": 64}

SILLY_TAVERN = {
    **{"url": "http://127.0.0.1:5001", "auth": "user:secret", "prompt": "a (b:1.2), c", "negative_prompt": "d"},
    **{"sampler_name": "PLMS", "scheduler": "Automatic", "steps": 4, "cfg_scale": 7, "width": 64, "height": 64},
    **{"restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 2, "hr_additional_modules": []},
    **{"denoising_strength": 0.7, "hr_second_pass_steps": 0, "override_settings": {"CLIP_stop_at_last_layers": 1}},
    **{"override_settings_restore_afterwards": True, "clip_skip": 1, "save_images": True, "send_images": True},
    **{"do_not_save_grid": False, "do_not_save_samples": False},
}
KOBOLD_LITE = {
    **{"prompt": "a", "seed": 42, "sampler_name": "PLMS", "batch_size": 1, "n_iter": 1, "steps": 4, "cfg_scale": 5},
    **{"width": 64, "height": 64, "negative_prompt": "", "do_not_save_samples": True, "do_not_save_grid": True},
    **{"enable_hr": False, "eta": 0, "s_churn": 0, "s_tmax": 0, "s_tmin": 0, "s_noise": 1},
    "override_settings": {
        **{"sd_model_checkpoint": "fake", "eta_noise_seed_delta": 0.0, "CLIP_stop_at_last_layers": 1.0},
        **{"ddim_discretize": "uniform", "img2img_fix_steps": False, "sd_hypernetwork": "None"},
        **{"inpainting_mask_weight": 1.0, "initial_noise_multiplier": 1.0, "comma_padding_backtrack": 20.0},
    },
}
OPEN_WEBUI = {"prompt": "a", "batch_size": 2, "width": 64, "height": 64, "steps": 4, "negative_prompt": "b"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sdapi")


@pytest.fixture
async def served(tmp_path):
    async with web(tmp_path, FakeEngine(max_slots=4), enable_sdapi=True, max_images=40) as running:
        yield running


def keys(folder: Path) -> KeyRing:
    file = folder / "keys"
    file.write_text(f"{KEY} name=studio\n{OTHER_KEY} name=garden\n")
    file.chmod(0o600)
    return KeyRing(file)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


async def post(served: Web, name: str, body: Any, **headers: str):
    return await served.post(f"{ROOT}/{name}", body, **headers)


async def until(told, condition) -> dict[str, Any]:
    """What `told` gives once it fits, within a bound."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition(found := await told()):  # noqa: ASYNC110 - an HTTP answer has no event
            await asyncio.sleep(0.01)
    return found


async def get(served: Web, name: str, **query: str) -> Any:
    answer = await served.client.get(f"{ROOT}/{name}", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def joined(served: Web):
    return [sample for plan in served.server.engine.plans for sample in plan.joins]


@pytest.mark.slow
async def test_webuiapi_as_it_is(folder):
    async with web(folder, FakeEngine(max_slots=4), keys=keys(folder), enable_sdapi=True) as served:
        host, _, port = served.address.rpartition(":")
        output = await asyncio.to_thread(run_client, "webuiapi", "webuiapi_pictures.py", host, port, KEY)
        seen = json.loads(output.splitlines()[-1])  # the client prints, too
        first = joined(served)[0].params
    assert (first.prompt, first.negative_prompt, first.scheduler, first.num_inference_steps) == ("a", "b", "pndm", 4)
    assert (seen["images"], seen["seeds"], seen["parameters"]) == ([[64, 64]] * 4, [5, 6, 7, 8], ["a", 5, 4, 64, "PLMS", 2])
    assert seen["infotext"].startswith(
        "a\nNegative prompt: b\nSteps: 4, Sampler: PLMS, Schedule type: Automatic, CFG scale: 7, Seed: 5,"
    )
    assert seen["read"] == "a"
    assert (seen["img2img"], seen["inpaint"]) == ([[96, 64], None, 0.5], [96, 64])
    assert seen["model"] == ["fake", ["fake"]]
    assert seen["samplers"] == ["Default", "LCM", "PLMS"]
    assert seen["schedulers"] == ["automatic", "beta", "exponential", "karras", "uniform"]
    assert (seen["lists"], seen["progress"], seen["interrupt"]) == ([[], [], [], {}], 0.0, [{}, {}])
    assert seen["memory"] == ["cuda", "ram"]
    assert seen["refused"] == [[422, "hr_upscaler"], [422, "sampler_name"], [422, "inpaint_full_res"], [401, ""]]


async def test_what_clients_send_is_served(served):
    for body, count in ((SILLY_TAVERN, 1), (KOBOLD_LITE, 1), (OPEN_WEBUI, 2)):
        answer = await post(served, "txt2img", body)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert sorted(told) == ["images", "info", "parameters"] and len(told["images"]) == count
        assert picture(told["images"][0]).size == (64, 64)
        assert "secret" not in answer.text and told["parameters"]["prompt"] == body["prompt"]
    assert json.loads(told["info"])["nsfw_content_detected"] == [False, False]
    options = await get(served, "options")
    assert options["sd_model_checkpoint"] == "fake" and options["samples_format"] == "png"
    for given in (options, {"sd_model_checkpoint": "test"}):
        answer = await post(served, "options", given)
        assert (answer.status_code, answer.json()) == (200, None), answer.text
    [model] = await get(served, "sd-models")
    assert (model["title"], model["model_name"]) == ("fake", "fake")


async def test_many_images_become_requests_of_as_many_as_one_may_have(served):
    answer = await post(served, "txt2img", {**ASK, "n_iter": 6, "batch_size": 3, "seed": 2**64 - 2, "send_images": False})
    told, seeds = answer.json(), [2**64 - 2, 2**64 - 1, *range(16)]
    assert (told["images"], json.loads(told["info"])["all_seeds"]) == ([], seeds)
    assert served.server.loop.activity().num_requests == 2


async def test_prompts_are_read_as_that_api_reads_them(served):
    for more, skipped in (({}, None), ({"clip_skip": 2}, 1), ({"override_settings": {"CLIP_stop_at_last_layers": 2.0}}, 1)):
        answer = await post(served, "txt2img", {**ASK, "prompt": "a (b:1.2)", **more})
        assert answer.status_code == 200, answer.text
        params, info = joined(served)[-1].params, json.loads(answer.json()["info"])
        assert (params.prompt, params.prompt_syntax, params.clip_skip) == ("a (b:1.2)", "a1111", skipped)
        assert info["clip_skip"] == 1 + (skipped or 0) and ("Clip skip: 2" in info["infotexts"][0]) is bool(skipped)


async def test_hires_fix_is_two_requests_for_each_image(served):
    body = {**ASK, **HIRES, "n_iter": 2, "seed": 3, "denoising_strength": 0.5, "hr_second_pass_steps": 6}
    answer = await post(served, "txt2img", body)
    assert answer.status_code == 200, answer.text
    told, samples = answer.json(), joined(served)
    assert [picture(text).size for text in told["images"]] == [(128, 128)] * 2
    firsts, seconds = ([one for one in samples if (one.input_image is None) is is_first] for is_first in (True, False))
    assert [one.seed for one in firsts] == [3, 4] and sorted(one.seed for one in seconds) == [3, 4]
    for one in seconds:
        assert (one.params.width, one.params.strength, one.params.num_inference_steps) == (128, 0.5, 6)
        [drawn] = [first for first in firsts if first.seed == one.seed]
        assert one.input_image.rgb[:3] == random.Random(drawn.seed).randbytes(3), "each begins with its own"
    info = json.loads(told["info"])
    assert (info["denoising_strength"], info["all_seeds"], info["width"]) == (0.5, [3, 4], 64)
    assert "Hires resize: 128x128, Hires steps: 6, Hires upscaler: Lanczos" in info["infotexts"][0]
    told = (await post(served, "txt2img", {**body, "prompt": "a skull"})).json()
    assert json.loads(told["info"])["nsfw_content_detected"] == [True, True], "what is flagged is not drawn again"
    assert len(joined(served)) == 6


class LoraEngine(FakeEngine):
    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, loras={"film": LoraInfo(name="film", revision="r", rank=4)})


async def test_prompts_name_loras(tmp_path):
    async with web(tmp_path, LoraEngine(), enable_sdapi=True) as served:
        assert [one["name"] for one in await get(served, "loras")] == ["film"]
        answer = await post(served, "txt2img", {**ASK, "prompt": "a <lora:film:0.5>"})
        assert answer.status_code == 200, answer.text
        params = joined(served)[0].params
        assert (params.prompt, params.loras) == ("a ", {"film": 0.5})
        info = json.loads(answer.json()["info"])
        assert info["prompt"] == "a <lora:film:0.5>" and info["infotexts"][0].startswith("a <lora:film:0.5>\nSteps")
        refused = (await post(served, "txt2img", {**ASK, "prompt": "a <lora:other:1>"})).json()
        assert refused["body"] == "prompt" and "film" in refused["detail"]


async def test_formats_and_flagged_pictures(served):
    body = {**ASK, "prompt": "a skull", "override_settings": {"samples_format": "webp", "jpeg_quality": 50}}
    told = (await post(served, "txt2img", body)).json()
    image = picture(told["images"][0])
    assert image.format == "WEBP" and max(high for _, high in image.convert("RGB").getextrema()) < 8
    assert json.loads(told["info"])["nsfw_content_detected"] == [True]


HIRES = {"enable_hr": True, "hr_upscaler": "Lanczos"}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("txt2img", {"enable_hr": True}, "hr_upscaler"),
    ("txt2img", {**HIRES, "hr_scale": 1.1}, "hr_scale"),
    ("txt2img", {**HIRES, "hr_scale": 100}, "hr_scale"),
    ("txt2img", {**HIRES, "hr_resize_x": 4096}, "hr_resize_x"),
    ("txt2img", {**HIRES, "hr_resize_x": 128, "hr_resize_y": 64}, "hr_resize_y"),
    ("txt2img", {**HIRES, "hr_second_pass_steps": 10**6}, "hr_second_pass_steps"),
    ("txt2img", {**HIRES, "hr_sampler_name": "Euler"}, "hr_sampler_name"),
    ("txt2img", {**HIRES, "denoising_strength": 0.1}, "denoising_strength"),
    ("txt2img", {"tiling": True}, "tiling"),
    ("txt2img", {"styles": ["photo"]}, "styles"),
    ("txt2img", {"subseed_strength": 0.5}, "subseed_strength"),
    ("txt2img", {"clip_skip": 99}, "clip_skip"),
    ("txt2img", {"override_settings": {"CLIP_stop_at_last_layers": -1}}, "override_settings.CLIP_stop_at_last_layers"),
    ("txt2img", {"prompt": "(a:99)"}, "prompt"),
    ("txt2img", {"prompt": "a <lora:b:1>"}, "prompt"),
    ("txt2img", {"prompt": "a <lora:b:1000>"}, "prompt"),
    ("txt2img", {"prompt": "a <lora:b:1:2>"}, "prompt"),
    ("txt2img", {"prompt": "a [b:c:0.5]"}, "prompt"),
    ("txt2img", {"negative_prompt": "<LoRA:b:1>"}, "negative_prompt"),
    ("txt2img", {"sampler_name": "DPM adaptive"}, "sampler_name"),
    ("txt2img", {"sampler_name": "PLMS", "scheduler": "Polyexponential"}, "scheduler"),
    ("txt2img", {"steps": 10**6}, "steps"),
    ("txt2img", {"steps": "20"}, "steps"),
    ("txt2img", {"n_iter": 10**6}, "request"),
    ("txt2img", {"n_iter": 2**63, "batch_size": 2**63}, "request"),
    ("txt2img", {"n_iter": 0}, "n_iter"),
    ("txt2img", {"width": 65}, "width"),
    ("txt2img", {"cfg_scale": 10**400}, "cfg_scale"),
    ("txt2img", {"override_settings": {"sd_model_checkpoint": "another"}}, "override_settings.sd_model_checkpoint"),
    ("txt2img", {"override_settings": {"sd_vae": "other.pt"}}, "override_settings.sd_vae"),
    ("txt2img", {"override_settings": {"filter_nsfw": False}}, "override_settings.filter_nsfw"),
    ("txt2img", {"override_settings": []}, "override_settings"),
    ("txt2img", {"alwayson_scripts": {"controlnet": {"args": [{"module": "canny"}]}}}, "alwayson_scripts.controlnet"),
    ("txt2img", {"num_inference_steps": 4}, "num_inference_steps"),
    ("txt2img", {"styles": {"a": [[[[]]]]}}, "styles"),
    ("img2img", {}, "init_images"),
    ("img2img", {"enable_hr": True}, "enable_hr"),
    ("img2img", {"init_images": ["%%%"]}, "init_images[0]"),
    ("img2img", {"init_images": ["data:image/png;base64,aGVsbG8="]}, "init_images[0]"),
    ("img2img", {"init_images": ["http://169.254.169.254/latest"]}, "init_images[0]"),
    ("img2img", {"init_images": [file_of(Image.new("RGB", (64, 64)))], "denoising_strength": 0}, "denoising_strength"),
    ("img2img", {"init_images": [file_of(Image.new("RGB", (64, 64)))], "resize_mode": 3}, "resize_mode"),
    ("options", {"sd_model_checkpoint": "another"}, "sd_model_checkpoint"),
    ("options", {"CLIP_stop_at_last_layers": 2}, "CLIP_stop_at_last_layers"),
    ("options", {"enable_pnginfo": False}, "enable_pnginfo"),
    ("png-info", {"image": ""}, "image"),
    ("png-info", {"image": "aGVsbG8="}, "image"),
]


async def test_what_would_change_the_picture_or_the_server_is_refused_by_name(served):
    for name, body, field in REFUSED:
        given = body if name in ("options", "png-info") else {**ASK, **body}
        answer = await post(served, name, given)
        told = answer.json()
        assert (answer.status_code, told["body"]) == (422, field), (name, body, answer.text)
        assert told["detail"] == told["errors"] and told["detail"].startswith(field) and told["error"]
    assert served.server.loop.activity().num_requests == 0
    for name in ("extra-single-image", "server-kill", "unload-checkpoint", "interrogate"):
        answer = await post(served, name, {})
        assert (answer.status_code, answer.json()["error"]) == (404, "not_found")
    answer = await post(served, "samplers", {})
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD") and answer.json()["detail"]


async def test_hostile_bodies_cost_one_refusal(served):
    bomb = Image.new("L", (1, 1))
    header = base64.b64decode(file_of(bomb))
    size = (60_000).to_bytes(4, "big") * 2
    huge = (
        header[:16] + size + header[24:29] + zlib.crc32(header[12:16] + size + header[24:29]).to_bytes(4, "big") + header[33:]
    )
    texts = [
        (422, {**ASK, "init_images": [base64.b64encode(huge).decode()]}),
        (422, {**ASK, "init_images": ["A" * 11_200_000]}),
        (413, {**ASK, "init_images": ["A" * (13 * 1024 * 1024)]}),
        (413, {**ASK, "init_images": [["A"]] * (1024 * 1024)}),
    ]
    for status, body in texts:
        answer = await post(served, "img2img", body)
        assert answer.status_code == status, answer.text[:200]
    deep = b'{"prompt": ' + b"[" * 100_000
    answer = await served.client.post(f"{ROOT}/txt2img", content=deep, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["body"]) == (422, "body")
    facts = ('"' * 50_000 + " a" * 200_000 + ":") * 2
    chunk = file_of(Image.new("RGB", (8, 8)))
    raw = base64.b64decode(chunk)
    text = b"tEXtparameters\0" + f"a\nSteps: 4, {facts}".encode()[:900_000]
    with_text = raw[:33] + (len(text) - 4).to_bytes(4, "big") + text + zlib.crc32(text).to_bytes(4, "big") + raw[33:]
    async with asyncio.timeout(20):
        answer = await post(served, "png-info", {"image": base64.b64encode(with_text).decode()})
    assert answer.status_code == 200 and answer.json()["parameters"]["Steps"] == "4"
    assert served.server.loop.activity().num_requests == 0


async def test_images_are_made_ready_as_that_api_does(served):
    start = Image.new("RGBA", (128, 64), (200, 0, 0, 255))
    start.paste((0, 0, 0, 0), (64, 0, 128, 64))
    ask = {**ASK, "init_images": ["data:image/png;base64," + file_of(start)], "denoising_strength": 0.5}
    assert (await post(served, "img2img", ask)).status_code == 200
    sample = joined(served)[-1]
    assert (sample.params.strength, sample.params.width, sample.input_image.mask) == (0.5, 64, None)
    rgb = Image.frombytes("RGB", (64, 64), sample.input_image.rgb)
    assert (rgb.getpixel((5, 5)), rgb.getpixel((60, 5))) == ((200, 0, 0), (255, 255, 255)), "squeezed, and on white"
    assert (await post(served, "img2img", {**ask, "resize_mode": 1})).status_code == 200
    rgb = Image.frombytes("RGB", (64, 64), joined(served)[-1].input_image.rgb)
    assert (rgb.getpixel((25, 5)), rgb.getpixel((38, 5))) == ((200, 0, 0), (255, 255, 255)), "the middle"

    turned = Image.new("RGB", (64, 64), (0, 0, 250))
    turned.paste((250, 0, 0), (0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 3
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    ask = {**ASK, "init_images": [file_of(turned, exif=exif)], "mask": file_of(mask), "mask_blur": 0}
    for more, left, colour in (
        ({}, 255, "filled"),
        ({"inpainting_mask_invert": 1}, 0, "filled"),
        ({"inpainting_fill": 1}, 255, "own"),
    ):
        answer = await post(served, "img2img", {**ask, **more})
        assert answer.status_code == 200, answer.text
        sample = joined(served)[-1]
        below = Image.frombytes("L", (64, 64), sample.input_image.mask)
        assert (below.getpixel((5, 5)), below.getpixel((60, 5))) == (left, 255 - left)
        assert sample.params.strength == 0.75
        rgb = Image.frombytes("RGB", (64, 64), sample.input_image.rgb)
        repainted, kept = ((5, 5), (60, 5)) if left else ((60, 5), (5, 5))
        assert rgb.getpixel(kept) == (0, 0, 250), "turned upside down, as EXIF says"
        assert (rgb.getpixel(repainted) == (0, 0, 250)) is (colour == "own")


async def test_progress_and_interrupt_are_about_ones_own(tmp_path):
    engine = FakeEngine(max_slots=4)
    turnstile = Turnstile()
    engine.gate = turnstile  # type: ignore[assignment]
    settings = {"show_progress_every_n_steps": 1}
    async with web(tmp_path, engine, enable_sdapi=True) as served, client_from(served, "127.0.0.2") as stranger:
        body = {**ASK, "steps": 100, "n_iter": 2, "force_task_id": "task(1)", "override_settings": settings}
        drawing = asyncio.create_task(post(served, "txt2img", body))
        turnstile.let(30)
        told = await until(lambda: get(served, "progress"), lambda told: told["current_image"])
        state = told["state"]
        assert 0 < told["progress"] < 1 and told["eta_relative"] > 0
        assert (state["job"], state["job_count"], state["job_no"], state["sampling_steps"]) == (
            "scripts_txt2img",
            2,
            0,
            100,
        )
        assert 0 < state["sampling_step"] <= 30 and picture(told["current_image"]).size == (64, 64)
        assert (await get(served, "progress", skip_current_image="true"))["current_image"] is None
        assert (await get(served, "progress", id_task="other"))["state"]["job_count"] == 0
        assert (await stranger.get(f"{ROOT}/progress", params={"id_task": "task(1)"})).json()["progress"] == 0
        for path in ("interrupt", "skip", "interrupt?id_task=task(1)"):
            assert (await stranger.post(f"{ROOT}/{path}")).json() == {}
        assert (await served.client.post(f"{ROOT}/interrupt?id_task=other")).json() == {}
        assert not (await get(served, "progress"))["state"]["interrupted"] and not drawing.done()
        assert (await served.client.post(f"{ROOT}/interrupt")).json() == {}
        answer = await drawing
        assert answer.status_code == 500 and "interrupted" in answer.json()["detail"]
        turnstile.set()
        await served.until_idle()
        assert (await get(served, "progress"))["progress"] == 0


async def test_who_interrupts_keeps_what_is_finished(tmp_path):
    async with web(tmp_path, FakeEngine(max_slots=1), enable_sdapi=True) as served:
        turnstile = Turnstile()
        served.server.engine.gate = turnstile  # type: ignore[assignment]
        drawing = asyncio.create_task(post(served, "txt2img", {**ASK, "n_iter": 3, "seed": 7}))
        turnstile.let(8)
        await until(lambda: get(served, "progress"), lambda told: told["state"]["job_no"])
        await served.client.post(f"{ROOT}/interrupt")
        told = (await drawing).json()
        assert json.loads(told["info"])["all_seeds"] in ([7], [7, 8]) and len(told["images"]) < 3
        turnstile.set()
        await served.until_idle()


async def test_keys_come_as_passwords_and_part_callers(tmp_path):
    async with web(tmp_path, FakeEngine(max_slots=2), keys=keys(tmp_path), enable_sdapi=True) as served:
        served.server.engine.gate.clear()
        own = {"authorization": "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()}
        other = {"authorization": f"Bearer {OTHER_KEY}"}
        drawing = asyncio.create_task(post(served, "txt2img", ASK, **own))
        await served.server.until(lambda: served.server.loop.activity().num_requests)
        await served.client.post(f"{ROOT}/interrupt", headers=other)
        assert (await served.client.get(f"{ROOT}/progress", headers=other)).json()["progress"] == 0
        assert (await served.client.get(f"{ROOT}/progress", headers=own)).json()["progress"] > 0
        served.server.engine.gate.set()
        assert (await drawing).status_code == 200
        for header in ("Basic", "Basic %%%", "Basic " + base64.b64encode(b"me:wrong").decode(), "Basic /w=="):
            answer = await served.client.get(f"{ROOT}/options", headers={"authorization": header})
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Basic"), header
        assert (await served.client.get("/v1/models", headers=own)).status_code == 401, "elsewhere the scheme is Bearer"


async def test_who_hangs_up_is_not_drawn_for(served):
    served.server.engine.gate.clear()
    _, writer = await served.start(f"{ROOT}/txt2img", {**ASK, "n_iter": 10, "steps": 1000})
    await served.server.until(lambda: served.server.loop.activity().num_running)
    writer.close()
    await served.server.until(lambda: not served.server.dispatcher._active)
    served.server.engine.gate.set()
    await served.until_idle()
    assert served.server.loop.activity().num_images == 0


async def test_it_is_off_unless_it_is_turned_on(tmp_path):
    async with web(tmp_path) as served:
        answer = await post(served, "txt2img", ASK)
        assert answer.status_code == 404 and "--enable-sdapi" in answer.text
        assert not any("sdapi" in path for path in (await served.client.get("/openapi.json")).json()["paths"])

"""OpenAI's images API over a real socket: whole answers, streams with previews, errors in its form."""

from __future__ import annotations

import asyncio

import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from web import events_of, picture, web

from mii_serve.errors import ContentBlockedError
from mii_serve.gateway import middleware
from mii_serve.gateway.dialects.openai import FORMATS, QUALITIES
from mii_serve.server.keys import KeyRing

PATH = "/v1/images/generations"
KEY = "studio-key-0123456789"


@pytest.fixture
async def served(tmp_path):
    async with web(tmp_path) as running:
        yield running


async def test_pictures_with_what_was_really_done(served):
    asked = {"prompt": "a", "n": 2, "size": "128x64", "seed": 5, "num_inference_steps": 3, "guidance_scale": 2}
    answer = await served.post(PATH, {**asked, "model": "fake", "negative_prompt": "x", "scheduler": "pndm", "user": "me"})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert [item["seed"] for item in told["data"]] == [5, 6]
    assert [item["nsfw_content_detected"] for item in told["data"]] == [False, False]
    first, second = (picture(item["b64_json"]) for item in told["data"])
    assert first.size == (128, 64) and first.tobytes() != second.tobytes()
    assert told["image"] == told["data"][0]["b64_json"], "Azure's Stability dialect"
    assert (told["size"], told["output_format"], told["background"]) == ("128x64", "png", "opaque")
    assert told["parameters"] | {"guidance_scale": 2.0, "num_inference_steps": 3, "engine": "fake"} == told["parameters"]
    assert isinstance(told["created"], int) and answer.headers["x-request-id"]


async def test_it_is_served_at_every_address(served):
    for path in (PATH, "/images/generations", "/openai/deployments/fake/images/generations?api-version=2025-04-01-preview"):
        assert (await served.post(path, {"prompt": "a"})).status_code == 200
    for path, body in (
        (PATH, {"prompt": "a", "model": "dall-e-3"}),
        ("/openai/deployments/other/images/generations", {"prompt": "a"}),
    ):
        answer = await served.post(path, body)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    for name in ("fake", "FAKE", "test"):  # the model, and the deployment
        assert (await served.client.get(f"/v1/models/{name}")).json()["id"] == "fake"
    [model] = (await served.client.get("/v1/models")).json()["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("fake", "model", "mii_serve")
    assert (await served.client.get("/v1/models/gpt-5")).status_code == 404


async def test_formats_and_qualities(served):
    for name in FORMATS:
        answer = await served.post(PATH, {"prompt": "a", "output_format": name})
        assert picture(answer.json()["image"]).format == ("JPEG" if name == "jpg" else name.upper())
    for body, wanted in (
        ({"response_format": "jpeg"}, "JPEG"),
        ({"output_format": "webp", "output_compression": 0}, "WEBP"),
        ({"output_compression": 100, "response_format": "b64_json", "model": None, "n": None, "size": "auto"}, "PNG"),
    ):
        answer = await served.post(PATH, {"prompt": "a", **body})
        assert answer.status_code == 200 and picture(answer.json()["image"]).format == wanted
    for name, times in QUALITIES.items():
        told = (await served.post(PATH, {"prompt": "a", "quality": name})).json()
        assert told["parameters"]["num_inference_steps"] == 4 * times, name
    told = (await served.post(PATH, {"prompt": "a", "quality": "low", "num_inference_steps": 7})).json()
    assert told["parameters"]["num_inference_steps"] == 7


REFUSED = [
    ({}, "prompt"),
    ({"prompt": 1}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": "a", "n": 11}, "n"),
    ({"prompt": "a", "n": True}, "n"),
    ({"prompt": "a", "size": "64"}, "size"),
    ({"prompt": "a", "size": "100x100"}, "size"),
    ({"prompt": "a", "size": "4096x4096"}, "size"),
    ({"prompt": "a", "quality": "best"}, "quality"),
    ({"prompt": "a", "response_format": "url", "stream": True}, "response_format"),
    ({"prompt": "a", "response_format": "uri"}, "response_format"),
    ({"prompt": "a", "n": 1.5}, "n"),
    ({"prompt": "a", "n": "1"}, "n"),
    ({"prompt": "a", "response_format": "jpeg", "output_format": "png"}, "response_format"),
    ({"prompt": "a", "output_format": "gif"}, "output_format"),
    ({"prompt": "a", "output_compression": 50}, "output_compression"),
    ({"prompt": "a", "background": "transparent"}, "background"),
    ({"prompt": "a", "stream": "yes"}, "stream"),
    ({"prompt": "a", "stream": True, "n": 2}, "stream"),
    ({"prompt": "a", "stream": True, "partial_images": 4}, "partial_images"),
    ({"prompt": "a", "partial_images": 1}, "partial_images"),
    ({"prompt": "a", "image_prompt": {"image": "x", "strength": 0.5}}, "image_prompt"),
    ({"prompt": "a", "style": "baroque"}, "style"),
    ({"prompt": "a", "steps": 5}, "steps"),
    ({"prompt": "a", "seed": -2}, "seed"),
    ({"prompt": "a", "num_inference_steps": 1001}, "num_inference_steps"),
    ({"prompt": "a", "guidance_scale": "7"}, "guidance_scale"),
    ({"prompt": "a", "scheduler": "x", "stream": True}, "scheduler"),
    ({"prompt": "a", "model": 3}, "model"),
]


async def test_every_refusal_names_the_member(served):
    for body, name in REFUSED:
        answer = await served.post(PATH, body)
        told = answer.json()["error"]
        assert (answer.status_code, told["type"], told["param"]) == (400, "invalid_request_error", name), (body, told)
        assert told["message"].startswith(f"{name}: ") and answer.headers["x-should-retry"] == "false"
    assert served.server.loop.activity().num_images == 0


@pytest.mark.parametrize("num_partials", [0, 1, 3])
async def test_a_stream_shows_at_most_as_many_partial_images_as_were_asked_for(served, num_partials):
    """All of them, unless the engine is faster than the reader: of previews that are not read yet, the latest is kept."""
    body = {"prompt": "a", "stream": True, "partial_images": num_partials, "num_inference_steps": 20, "seed": 3}
    answer = await served.post(PATH, {**body, "output_format": "jpeg"})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    num_shown = len(events) - 1
    assert min(1, num_partials) <= num_shown <= num_partials
    names = ["image_generation.partial_image"] * num_shown + ["image_generation.completed"]
    assert [name for name, _ in events] == names == [value["type"] for _, value in events]
    assert [value["partial_image_index"] for _, value in events[:-1]] == list(range(num_shown))
    for _, value in events:
        assert picture(value["b64_json"]).format == "JPEG"
        assert (value["size"], value["output_format"], value["background"]) == ("64x64", "jpeg", "opaque")
    assert events[-1][1]["usage"]["total_tokens"] == 0 and events[-1][1]["seed"] == 3
    shown = [i for i, plan in enumerate(served.server.engine.plans, 1) if plan.previews]
    assert shown[:3] == {0: [], 1: [10], 3: [5, 10, 15]}[num_partials]


async def test_fewer_steps_than_previews_show_what_there_is(served):
    answer = await served.post(PATH, {"prompt": "a", "stream": True, "partial_images": 3, "num_inference_steps": 2})
    assert [name.rpartition(".")[2] for name, _ in events_of(answer.text)] == ["partial_image", "completed"]


async def test_a_stream_that_cannot_go_on_says_so(served):
    served.server.engine.fail_sample_of("doomed")
    answer = await served.post(PATH, {"prompt": "a", "stream": True}, x_request_id="doomed")
    [(name, value)] = events_of(answer.text)
    assert (answer.status_code, name, value["error"]["type"]) == (200, "error", "server_error")
    assert value["error"]["code"] == "generation_failed"


async def test_a_stream_that_waits_shows_that_it_is_there(served, monkeypatch):
    monkeypatch.setattr(middleware, "KEEPALIVE_S", 0.05)
    served.server.engine.gate.clear()
    reader, writer = await served.start(PATH, {"prompt": "a", "stream": True})
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(3):
            await reader.readuntil(b": still here\n\n")
        served.server.engine.gate.set()
        await reader.readuntil(b"event: image_generation.completed\n")
    writer.close()


async def test_who_leaves_a_stream_frees_the_slot(served):
    body = {"prompt": "a", "stream": True, "partial_images": 3, "num_inference_steps": 1000}
    served.server.engine.gate.clear()
    reader, writer = await served.start(PATH, body)
    assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
    await served.server.until(lambda: served.server.loop.activity().num_running)
    writer.close()
    await served.server.until(lambda: served.server.loop.activity().num_cancelled_requests == 1)
    served.server.engine.gate.set()
    await served.until_idle()
    assert served.server.loop.activity().num_images == 0


async def test_statuses_tell_the_client_what_to_repeat(tmp_path):
    async with web(tmp_path, FakeEngine(), max_waiting_samples=1) as served:
        served.server.engine.gate.clear()
        full = await served.post(PATH, {"prompt": "a", "n": 10})
        assert (full.status_code, full.headers["x-should-retry"]) == (429, "true")
        assert full.json()["error"]["code"] == "rate_limit_exceeded" and int(full.headers["retry-after"]) >= 1
        late = await served.post(PATH, {"prompt": "a"}, x_request_timeout_s="0.2")
        assert (late.status_code, late.headers["x-should-retry"]) == (504, "false")
        served.server.engine.gate.set()
        await served.until_idle()
        served.server.engine.fail_sample_of("doomed")
        failed = await served.post(PATH, {"prompt": "a"}, x_request_id="doomed")
        assert (failed.status_code, failed.headers["x-should-retry"]) == (500, "false")
        await served.server.dispatcher.drain(1)
        draining = await served.post(PATH, {"prompt": "a", "stream": True})
        assert (draining.status_code, draining.headers["x-should-retry"]) == (503, "true")


async def test_flagged_pictures(tmp_path):
    async with web(tmp_path) as served:
        refused = await served.post(PATH, {"prompt": "a skull", "n": 2})
        told = refused.json()["error"]
        assert (refused.status_code, told["code"]) == (400, "moderation_blocked")
        assert told["moderation_details"] == {"moderation_stage": "output", "categories": ["nsfw"]}
        [(name, value)] = events_of((await served.post(PATH, {"prompt": "a skull", "stream": True})).text)
        assert name == "error" and value["error"]["code"] == "moderation_blocked"
    async with web(tmp_path, refuse_flagged_images=False) as served:
        [item] = (await served.post(PATH, {"prompt": "a skull"})).json()["data"]
        assert item["nsfw_content_detected"] is True
        assert picture(item["b64_json"]).getextrema() == ((0, 0),) * 3


async def test_a_prompt_that_content_safety_blocks(served, monkeypatch):
    async def events(request, call, **options):
        raise ContentBlockedError("prompt", {"Violence": 4}, stage="input")
        yield

    monkeypatch.setattr(served.server.dispatcher, "events", events)
    for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}):
        answer = await served.post(PATH, body)
        told = answer.json()["error"]
        assert (answer.status_code, told["code"], told["type"]) == (400, "moderation_blocked", "image_generation_user_error")
        assert told["moderation_details"] == {"moderation_stage": "input", "categories": ["Violence"]}
        assert "safety_violations=[Violence]" in told["message"]


async def test_keys_come_in_three_ways(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{KEY} name=studio requests_per_minute=4\n")
    file.chmod(0o600)
    async with web(tmp_path, keys=KeyRing(file)) as served:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"api_key": "wrong"}, {"authorization": "Basic eDp5"}):
            answer = await served.post(PATH, {"n": "not even looked at"}, **headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert (await served.client.get("/v1/models")).status_code == 401
        assert (await served.client.get("/v1/models", headers={"api-key": KEY})).status_code == 200
        for headers in ({"authorization": f"Bearer {KEY}"}, {"api_key": KEY}, {"authorization": KEY}):
            for path, body in ((PATH, {"prompt": "a"}),):
                assert (await served.post(path, body, **headers)).status_code == 200
        score = {"input_data": {"columns": ["prompt"], "data": ["a"]}}
        assert (await served.post("/score", score, api_key=KEY)).status_code == 200
        limited = await served.post("/score", score, api_key=KEY)
        assert limited.status_code == 429 and int(limited.headers["retry-after"]) > 1, "a limit's end is certain"
        assert (await served.client.get("/readyz")).status_code == 200

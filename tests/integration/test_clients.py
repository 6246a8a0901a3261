"""Other people's clients as they are, each from an environment of its own, against a real socket."""

from __future__ import annotations

import asyncio
import json

import pytest
from fake_engine import FakeEngine
from outside import run_client
from web import Web, counted, picture, web

from mii_serve.errors import DeadlineExceededError, EngineError, QueueFullError, UnavailableError
from mii_serve.server.keys import KeyRing

KEY = "studio-key-0123456789"


@pytest.fixture
async def served(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{KEY} name=studio\n")
    file.chmod(0o600)
    async with web(tmp_path, keys=KeyRing(file)) as running:
        yield running


async def posts(served: Web, path: str, code: str) -> float:
    text = (await served.client.get("/metrics")).text
    return counted(text, "mii_serve_requests_total", method=f"POST {path}", code=code)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openai", "openai1"])
async def test_openais_client(served, name):
    served.server.engine.fail_sample_of("doomed")
    seen = json.loads(await asyncio.to_thread(run_client, name, "openai_images.py", f"http://{served.address}"))
    assert seen["version"].split(".")[0] == {"openai": "3", "openai1": "1"}[name]
    assert seen["data"] == [["89504e47", 5, False], ["89504e47", 6, False]]
    assert seen["stability"] and seen["request_id"]
    assert seen["url"] == ["image/png", "89504e47", None]
    assert (seen["without_version"], seen["azure"], seen["models"]) == (1, 1, ["fake"])
    *partials, last = [(kind, index) for kind, index, _ in seen["events"]]
    # an engine without a model is faster than any reader: of previews that are not read yet, the latest is kept
    assert partials in ([("image_generation.partial_image", index) for index in range(num)] for num in (1, 2))
    assert last == ("image_generation.completed", None)
    assert {start for _, _, start in seen["events"]} == {"iVBO"}
    assert seen["edits"] == [[5, 6], ["89504e47"]]
    assert seen["variations"] == ["89504e47"] * 2
    assert seen["errors"] == {
        "mask": ["BadRequestError", 400, "invalid_value"],
        "size": ["BadRequestError", 400, "invalid_value"],
        "model": ["NotFoundError", 404, "model_not_found"],
        "unknown": ["BadRequestError", 400, "invalid_value"],
        "flagged": ["BadRequestError", 400, "moderation_blocked"],
        "flagged stream": ["APIError", None, "moderation_blocked"],
        "key": ["AuthenticationError", 401, "invalid_api_key"],
        "doomed": ["InternalServerError", 500, "generation_failed"],
    }
    assert await posts(served, "/v1/images/generations", "INTERNAL") == 1, "x-should-retry: false is obeyed"


ENDS = {
    "doomed": EngineError("told to fail"),
    "late": DeadlineExceededError("too late"),
    "full": QueueFullError("the line is full", 1.0),
    "away": UnavailableError("the server is draining"),
}


@pytest.mark.slow
async def test_azures_client_sends_again_only_what_cost_nothing(served, tmp_path, monkeypatch):
    events = served.server.dispatcher.events

    async def ending(request, call, **options):
        if request.params.prompt in ENDS:
            raise ENDS[request.params.prompt]
        async for event in events(request, call, **options):
            yield event

    monkeypatch.setattr(served.server.dispatcher, "events", ending)
    requests = {
        "good": {"columns": ["prompt"], "data": ["a", "a skull"], "index": [0, 1], "parameters": {"num_inference_steps": 3}},
        "malformed": {"columns": ["prompt"], "data": [1]},
        "too much": {"columns": ["prompt"], "data": ["a"], "parameters": {"num_inference_steps": 2000}},
        **{name: {"columns": ["prompt"], "data": [name]} for name in ENDS},
    }
    files = []
    for name, request in requests.items():
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"input_data": request}))
    address = f"http://{served.address}/score"
    out = await asyncio.to_thread(run_client, "azureml", "azureml_invoke.py", address, KEY, *map(str, files))
    told = dict(zip(requests, json.loads(out), strict=True))
    assert told["good"]["type"] == "str"
    assert [image["nsfw_content_detected"] for image in told["good"]["answer"]] == [False, True]
    assert picture(told["good"]["answer"][0]["generated_image"]).mode == "RGB"
    assert "input_data.data[0]: must be text" in told["malformed"]["message"]
    statuses = {name: answer.get("status") for name, answer in told.items()}
    wanted = {"good": None, "malformed": 400, "too much": 422, "doomed": 424, "late": 424, "full": 429, "away": 503}
    assert statuses == wanted
    codes = ("INVALID_ARGUMENT", "INTERNAL", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE")
    assert [await posts(served, "/score", code) for code in codes] == [2, 1, 1, 1, 4]


@pytest.mark.slow
async def test_hundreds_of_cases_drawn_from_our_own_description(tmp_path):
    async with web(tmp_path, FakeEngine(max_slots=8), max_steps=100, max_images=8) as served:
        out = await asyncio.to_thread(run_client, "schemathesis", "fuzz.py", f"http://{served.address}", "10")
        assert int(out) >= 500
        await served.until_idle()
        text = (await served.client.get("/metrics")).text
        assert counted(text, "mii_serve_requests_total", code="OK") > 50
        assert [counted(text, "mii_serve_requests_total", code=code) for code in ("INTERNAL", "UNAVAILABLE", "CANCELLED")] == [
            0
        ] * 3

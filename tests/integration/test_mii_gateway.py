"""The address of MII's RESTful gateway, asked as its documentation does."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess

import pytest
from web import web

PATH = "/mii/test"


@pytest.fixture
async def served(tmp_path):
    async with web(tmp_path, max_steps=100) as running:
        yield running


async def test_curl_as_in_miis_documentation(served):
    asked = {"request": {"query": ["a", "a skull"]}, "kwargs": {"num_inference_steps": 3, "seed": 5}}
    command = ["curl", "-s", "--header", "Content-Type: application/json", "--request", "POST", "-d", json.dumps(asked)]
    command += [f"http://{served.address}{PATH}"]
    ran = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True, timeout=60)
    reply = json.loads(json.loads(ran.stdout))
    assert sorted(reply) == ["images", "mode", "nsfwContentDetected", "sizeH", "sizeW", "timeTaken"]
    assert (reply["mode"], reply["sizeW"], reply["sizeH"], reply["nsfwContentDetected"]) == ("RGB", "64", "64", [False, True])
    pixels = [base64.b64decode(text, validate=True) for text in reply["images"]]
    assert [len(one) for one in pixels] == [64 * 64 * 3] * 2 and not any(pixels[1]) and reply["timeTaken"] > 0
    seeds = [(sample.params.num_inference_steps, sample.seed) for plan in served.server.engine.plans for sample in plan.joins]
    assert seeds == [(3, 5), (3, 6)]


async def test_one_prompt_and_its_negative(served):
    asked = {"request": {"prompt": "a", "negative_prompt": "b"}, "kwargs": {"num_images_per_prompt": 2}}
    answer = await served.post("/mii/fake", asked)
    assert answer.status_code == 200 and len(json.loads(answer.json())["images"]) == 2
    assert answer.headers["content-type"] == "application/json" and answer.headers["x-mii-provenance"]
    [sample, _] = [sample for plan in served.server.engine.plans for sample in plan.joins]
    assert sample.params.negative_prompt == "b"


async def test_what_is_refused_says_why(served):
    refused = [
        ("/mii/another", {"request": {"prompt": "a"}}, 404, "there is no model"),
        (PATH, {"request": {}}, 400, "request.prompt"),
        (PATH, {"request": {"prompt": ["a"] * 65}}, 400, "request.prompt"),
        (PATH, {"request": {"prompt": "a", "query": "b"}}, 400, "request.query"),
        (PATH, {"request": {"prompt": "a", "negative_prompt": ["b", "c"]}}, 400, "request.negative_prompt"),
        (PATH, {"request": {"prompt": "a"}, "kwargs": {"generator": [1]}}, 400, "kwargs.generator"),
        (PATH, {"request": {"prompt": "a"}, "kwargs": {"max_length": 100}}, 400, "query_kwargs"),
        (PATH, {"request": {"prompt": "a"}, "kwargs": {"num_inference_steps": 101}}, 422, "denoising steps"),
        (PATH, {"request": {"prompt": "a"}, "kwargs": {"num_images_per_prompt": 10**9}}, 400, "num_images_per_prompt"),
        (PATH, {"prompt": "a"}, 400, "prompt"),
        (PATH, ["a"], 400, "JSON object"),
    ]
    for path, body, status, said in refused:
        answer = await served.post(path, body)
        assert answer.status_code == status and said in answer.json()["message"], (body, answer.text)
    assert (await served.client.get("/terminate")).status_code == 404
    assert served.server.loop.activity().num_requests == 0

"""The Open Inference Protocol over HTTP: JSON, and JSON with raw tensors after it."""

from __future__ import annotations

import asyncio
import base64
import json
import struct

import pytest
from fake_engine import FakeEngine
from outside import run_client
from test_open_inference import colour, pixel
from web import Web, web

from mii_serve.errors import DeadlineExceededError
from mii_serve.gateway.app import build_app
from mii_serve.server.keys import KeyRing

INFER = "/v2/models/fake/infer"
PROMPT = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a"]}


@pytest.fixture
async def served(tmp_path):
    async with web(tmp_path) as running:
        yield running


def tensor(name: str, datatype: str, *data, **more) -> dict:
    return {"name": name, "datatype": datatype, "shape": [len(data)], "data": list(data), **more}


async def raw(served: Web, head: dict, contents: bytes, length: object = None, path: str = INFER):
    given = json.dumps(head).encode()
    headers = {"Inference-Header-Content-Length": str(len(given) if length is None else length)}
    return await served.client.post(path, content=given + contents, headers=headers)


async def test_json_has_images_in_base64(served):
    inputs = [
        {"name": "prompt", "datatype": "BYTES", "shape": [2, 1], "data": [["a"], ["a skull"]]},
        tensor("seed", "UINT64", 5.0),
        tensor("guidance_scale", "FP32", 2),
    ]
    body = {"id": "mine", "inputs": inputs, "parameters": {"num_inference_steps": 3.0, "scheduler": "pndm"}}
    for path in (INFER, "/v2/models/fake/versions/1/infer"):
        answer = await served.post(path, body)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        outputs = {one["name"]: one for one in told["outputs"]}
        images = [pixel(base64.b64decode(text)) for text in outputs["generated_image"]["data"]]
        assert images == [colour(5), (0, 0, 0)]
        assert (outputs["seed"]["data"], outputs["nsfw_content_detected"]["data"]) == ([5, 6], [False, True])
        assert (told["id"], told["model_name"], told["model_version"]) == ("mine", "fake", "1")
        assert (told["parameters"]["num_inference_steps"], told["parameters"]["guidance_scale"]) == (3, 2)


async def test_raw_tensors_come_after_the_json(served):
    prompt = struct.pack("<I", 1) + b"a"
    inputs = [
        {"name": "prompt", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(prompt)}},
        {"name": "seed", "datatype": "INT64", "shape": [1], "parameters": {"binary_data_size": 8}},
    ]
    seed = struct.pack("<q", 5)
    answer = await raw(served, {"inputs": inputs, "parameters": {"binary_data_output": True}}, prompt + seed)
    size = int(answer.headers["inference-header-content-length"])
    told, rest = json.loads(answer.content[:size]), answer.content[size:]
    assert [one["parameters"]["binary_data_size"] for one in told["outputs"]] == [len(rest) - 9, 1, 8]
    assert pixel(rest[4:-9]) == colour(5) and rest[-9:] == b"\0" + seed
    outputs = [{"name": "seed", "parameters": {"binary_data": True}}, {"name": "nsfw_content_detected"}]
    answer = await raw(served, {"inputs": inputs, "outputs": outputs}, prompt + seed)
    size = int(answer.headers["inference-header-content-length"])
    assert answer.content[size:] == seed and json.loads(answer.content[:size])["outputs"][1]["data"] == [False]


RAW = {"name": "prompt", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 5}}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "inputs: is missing"),
        ({"inputs": []}, "inputs.prompt: is missing"),
        ({"inputs": [{**PROMPT, "shape": [-1]}]}, "inputs.prompt.shape: must have dimensions of 1 or more, got [-1]"),
        ({"inputs": [{**PROMPT, "shape": [2**64]}]}, "inputs[0].shape[0]: must be at most"),
        ({"inputs": [{**PROMPT, "shape": [2]}]}, "inputs.prompt.data: must have the 2 elements of its shape, got 1"),
        ({"inputs": [{**PROMPT, "data": [3]}]}, "inputs.prompt.data[0]: must be text, got 3"),
        ({"inputs": [{**PROMPT, "data": [{}]}]}, "inputs.prompt.data: must be text, a number, true or false, got an object"),
        ({"inputs": [{**PROMPT, "data": [[[[[[[[["a"]]]]]]]]]}]}, "inputs.prompt.data: must be nested at most 8 deep"),
        ({"inputs": [{**PROMPT, "datatype": "STRING"}]}, "inputs.prompt.datatype: must be one of BYTES"),
        ({"inputs": [PROMPT, tensor("seed", "INT32", 2**40)]}, "inputs.seed.data[0]: must fit into INT32, got 1099511627776"),
        ({"inputs": [PROMPT, tensor("seed", "INT64", 1.5)]}, "inputs.seed.data[0]: must be a whole number, got 1.5"),
        ({"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1]}]}, "inputs.prompt.data: is missing, and so is"),
        ({"inputs": [RAW]}, "inputs.prompt.parameters.binary_data_size: must be in the 0 bytes that are left"),
        (
            {"inputs": [PROMPT], "parameters": {"steps": 3}},
            "parameters.steps: is not known here; did you mean num_inference_steps",
        ),
        ({"inputs": [PROMPT], "parameters": {"height": 99}}, "parameters.height: must be a multiple of 8"),
        (
            {"inputs": [PROMPT], "parameters": {"seed": [1]}},
            "parameters.seed: must be text, a number, true or false, got an array",
        ),
        ({"inputs": [PROMPT], "outputs": [{"name": "image"}]}, "outputs.image: is not known here"),
        ({"inputs": [PROMPT], "id": "a" * 2000}, "id: must be at most 1024 characters, got 2000"),
    ],
)
async def test_a_broken_rule_names_the_member(served, body, said):
    answer = await served.post(INFER, body)
    assert answer.status_code == 400 and answer.json()["error"].startswith(said), answer.text
    assert served.server.loop.activity().num_requests == 0


async def test_lengths_that_lie_are_refused(served):
    prompt = struct.pack("<I", 1) + b"a"
    for contents, length, said in (
        (prompt[:4], None, "inputs.prompt.parameters.binary_data_size: must be in the 4 bytes"),
        (prompt + b"x", None, "body: must have no bytes after its last tensor, got 1 more"),
        (b"\xff\xff\xff\xffa", None, "inputs.prompt: must have 1 elements, each a length of 4 bytes"),
        (prompt, 10**9, "Inference-Header-Content-Length: must be the bytes of JSON, of the"),
        (prompt, "-1", "Inference-Header-Content-Length: must be the bytes of JSON, of the"),
        (prompt, 3, "body: must be JSON"),
    ):
        answer = await raw(served, {"inputs": [RAW]}, contents, length)
        assert answer.status_code == 400 and answer.json()["error"].startswith(said), answer.text
    big = await served.post(INFER, {"inputs": [{**PROMPT, "data": ["a" * 5_000_000]}]})
    assert (big.status_code, big.json()["error"]) == (413, "body: must be at most 4194304 bytes")
    form = await served.client.post(INFER, content=b"{}", headers={"content-type": "application/x-www-form-urlencoded"})
    assert form.status_code == 415


async def test_what_the_server_says_of_itself_and_its_model(served):
    app = build_app(served.server.dispatcher, KeyRing(), None, ("org/sd", "sd-1"))
    import httpx2

    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://x") as client:
        assert (await client.get("/v2")).json()["name"] == "mii_serve"
        for name, told in (("org/sd", "org/sd"), ("sd-1", "sd-1"), ("SD", "org/sd"), ("org/sd/versions/1", "org/sd")):
            for end in ("", "/ready", "/config"):
                answer = await client.get(f"/v2/models/{name}{end}")
                assert (answer.status_code, answer.json()["name"]) == (200, told)
        index = await client.post("/v2/repository/index", content=b"")
        assert [one["name"] for one in index.json()] == ["org/sd", "sd-1"]
        for path in ("/v2/models/other", "/v2/models/other/ready", "/v2/models/org/sd/versions/2/ready"):
            answer = await client.get(path)
            assert answer.status_code == 404 and answer.json()["error"], path
        assert (await client.get("/v2/models/org/sd/infer")).status_code == 405
    await served.server.dispatcher.drain(1)
    statuses = [
        (await served.client.get(f"/v2/{path}")).status_code for path in ("health/live", "health/ready", "models/fake/ready")
    ]
    assert statuses == [200, 503, 503]


async def test_bounds_keys_and_leaving_are_those_of_every_route(tmp_path):
    file = tmp_path / "keys"
    file.write_text("studio-key-0123456789 name=studio\n")
    file.chmod(0o600)
    async with web(tmp_path, FakeEngine(), keys=KeyRing(file), max_images=2, max_steps=2000) as served:
        assert (await served.post(INFER, {"inputs": [PROMPT]})).status_code == 401
        assert (await served.client.get("/v2/health/ready")).status_code == 200
        served.client.headers["authorization"] = "Bearer studio-key-0123456789"
        many = await served.post(INFER, {"inputs": [{**PROMPT, "shape": [3], "data": ["a", "b", "c"]}]})
        assert (many.status_code, many.json()["error"]) == (422, "request: must be for at most 2 images in all, got 3")
        served.server.engine.gate.clear()
        late = await served.post(INFER, {"inputs": [PROMPT], "parameters": {"timeout": 200_000}})
        assert late.status_code == 504
        leaving = asyncio.ensure_future(served.post(INFER, {"inputs": [PROMPT], "parameters": {"num_inference_steps": 1000}}))
        await served.server.until(lambda: served.server.dispatcher._active)
        leaving.cancel()
        await served.server.until(lambda: not served.server.dispatcher._active)
        served.server.engine.gate.set()
        await served.until_idle()
        assert served.server.loop.activity().num_images == 0


@pytest.mark.slow
async def test_tritons_client(tmp_path, monkeypatch):
    async with web(tmp_path) as served:
        events = served.server.dispatcher.events

        async def holding(request, call, **options):
            """Prompts that are "held" never come to work, as behind a full queue."""
            if request.params.prompt == "held":
                await asyncio.sleep(3600 if call.left_s is None else call.left_s)
                raise DeadlineExceededError("too late")
            async for event in events(request, call, **options):
                yield event

        monkeypatch.setattr(served.server.dispatcher, "events", holding)
        served.server.engine.fail_sample_of("doomed")
        out = await asyncio.to_thread(
            run_client, "tritonclient", "tritonclient_infer.py", served.server.target, served.address, "fake"
        )
        await served.until_idle()
    seen = json.loads(out)
    for protocol in (seen["grpc"], seen["http"]):
        assert (protocol["live"], protocol["server"]) == ([True, True, True, False], "mii_serve")
        assert (protocol["inputs"]["prompt"], protocol["inputs"]["seed"]) == ("BYTES", "UINT64")
        assert protocol["config"][:2] == [0, ["prompt"]]
        assert protocol["index"] == [{"name": "fake", "version": "1", "state": "READY"}]
        images = {"images": ["89504e47"] * 2, "nsfw": [False, True], "seeds": [5, 6]}
        assert protocol["infer"] == {**images, "id": "mine", "model": "fake"}
        assert protocol["errors"]["rule"][1] == "inputs.height: must be a multiple of 8 in [64, 1024], got 99"
    assert (seen["grpc"]["parameters"], seen["grpc"]["async"], seen["grpc aio"]) == ([[9], True], [[5], True], [[5]] * 3)
    assert {name: error[0].removeprefix("StatusCode.") for name, error in seen["grpc"]["errors"].items()} == {
        **dict.fromkeys(("model", "version"), "NOT_FOUND"),
        "rule": "INVALID_ARGUMENT",
        "huge": "RESOURCE_EXHAUSTED",
        **dict.fromkeys(("load", "shared memory"), "UNIMPLEMENTED"),
        "doomed": "INTERNAL",
        **dict.fromkeys(("late", "client timeout"), "DEADLINE_EXCEEDED"),
    }
    assert seen["grpc"]["cancelled"] == [True, True]
    assert seen["grpc"]["stream"][0] and "ModelStreamInfer is not served here: send ModelInfer" in seen["grpc"]["stream"][1]
    assert (seen["http"]["json"], seen["http"]["async"], seen["http aio"]) == (["89504e47", [9]], [[5], [5]], [5])
    statuses = {name: error[0] for name, error in seen["http"]["errors"].items()}
    assert statuses == {"model": "404", "rule": "400", "huge": "413", "load": "404", "late": "504", "compressed": "415"}

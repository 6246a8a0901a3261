"""Azure ML's online contract over a real socket: every form of a request that exists, every refusal by its path."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import logging
from dataclasses import replace

import pytest
from fake_engine import FakeEngine
from web import Web, counted, picture, web

from mii_serve.errors import ContentBlockedError
from mii_serve.types import ImageReady

CARD = {
    "input_data": {
        "columns": ["prompt"],
        "data": ["a photograph of an astronaut riding a horse", "a skull"],
        "index": [0, 1],
        "parameters": {"num_inference_steps": 5, "guidance_scale": 7.5},
    }
}


@pytest.fixture
async def served(tmp_path):
    async with web(tmp_path) as running:
        yield running


def asking(data, columns=("prompt",), **more):
    return {"input_data": {"columns": list(columns), "data": data, **more}}


BOTH = ("prompt", "negative_prompt")
ACCEPTED = {
    "A the card's": (asking(["a", "b"], index=[0, 1]), ["a", "b"]),
    "B without index": (asking(["a", "b"]), ["a", "b"]),
    "C rows of lists": (asking([["a"], ["b"]]), ["a", "b"]),
    "D rows of objects": (asking([{"prompt": "a"}, {"prompt": "b"}]), ["a", "b"]),
    "E objects and index": (asking([{"prompt": "a"}], index=[0]), ["a"]),
    "F a key missing in a row": (asking([{"prompt": "a", "negative_prompt": "x"}, {"prompt": "b"}], BOTH), ["a", "b"]),
    "G null in a list": (asking([["a", "x"], ["b", None]], BOTH), ["a", "b"]),
    "H a key that is no column": (asking([{"prompt": "a", "other": 1}]), ["a"]),
    "K an index twice": (asking(["a", "b"], index=[0, 0]), ["a", "b"]),
    "L an index of texts": (asking(["a", "b"], index=["x", "y"]), ["a", "b"]),
    "N by column": (asking({"prompt": ["a", "b"]}), ["a", "b"]),
    "N by column, both": (asking({"prompt": ["a", "b"], "negative_prompt": [None, "x"]}, BOTH), ["a", "b"]),
    "columns the other way round": (asking([["x", "a"]], BOTH[::-1]), ["a"]),
    "a null index": (asking(["a"], index=None), ["a"]),
}


async def test_every_form_is_accepted_and_the_order_kept(served):
    for name, (body, prompts) in ACCEPTED.items():
        answer = await served.post("/score", body)
        assert answer.status_code == 200, (name, answer.text)
        assert [image["prompt"] for image in answer.json()] == prompts, name


REFUSED = {
    "I texts for two columns": (asking(["a", "b"], BOTH), "input_data.data[0]"),
    "J another length of index": (asking(["a", "b"], index=[0]), "input_data.index"),
    "M data is a text": (asking("a"), "input_data.data"),
    "O no columns": ({"input_data": {"data": ["a"]}}, "input_data.columns"),
    "O no data": ({"input_data": {"columns": ["prompt"]}}, "input_data.data"),
    "P no rows": (asking([]), "input_data.data"),
    "P no rows by column": (asking({"prompt": []}), "input_data.data"),
    "Q a number": (asking(["a", 1]), "input_data.data[1]"),
    "Q a number in an object": (asking([{"prompt": 2.5}]), "input_data.data[0].prompt"),
    "R null": (asking([None]), "input_data.data[0]"),
    "R null in a list": (asking([["x", None]], BOTH[::-1]), "input_data.data[0][1]"),
    "S no column prompt": (asking(["a"], ("negative_prompt",)), "input_data.columns"),
    "a column nobody reads": (asking([["a", "b"]], ("prompt", "style")), "input_data.columns[1]"),
    "T a member nobody reads": (asking(["a"], foo=1), "input_data.foo"),
    "T params inside": (asking(["a"], params={}), "input_data.params"),
    "a list of another length": (asking([["a", "b"]]), "input_data.data[0]"),
    "columns of two lengths": (asking({"prompt": ["a"], "negative_prompt": []}, BOTH), "input_data.data"),
    "no prompt in a row": (asking([{"text": "a"}]), "input_data.data[0].prompt"),
    "an empty prompt": (asking(["a", "  "]), "input_data.data[1]"),
    "a top member nobody reads": ({**asking(["a"]), "id": 1}, "id"),
    "a number for negative": (asking([["a", 1]], BOTH), "input_data.data[0][1]"),
    "no object": ([asking(["a"])], "body"),
    "input_data is a list": ({"input_data": ["a"]}, "input_data"),
    "an unknown parameter": (asking(["a"], parameters={"steps": 5}), "input_data.parameters.steps"),
    "a parameter of another kind": (
        asking(["a"], parameters={"num_inference_steps": "5"}),
        "input_data.parameters.num_inference_steps",
    ),
    "a number beyond 64 bits": (
        asking(["a"], parameters={"num_images_per_prompt": 10**4000, "num_inference_steps": 10**4000}),
        "input_data.parameters.num_inference_steps",
    ),
    "a float for a count": ({**asking(["a"]), "params": {"height": 64.5}}, "params.height"),
    "an unknown scheduler": ({**asking(["a"]), "parameters": {"scheduler": "x"}}, "parameters.scheduler"),
    "steps that are no list": (asking(["a"], parameters={"timesteps": 5}), "input_data.parameters.timesteps"),
    "a contradiction": (
        {**asking(["a"], parameters={"seed": 1}), "params": {"seed": 2}},
        "params.seed",
    ),
}


async def test_every_refusal_names_the_path_and_costs_nothing(served):
    for name, (body, path) in REFUSED.items():
        answer = await served.post("/score", body)
        assert answer.status_code == 400, (name, answer.text)
        told = answer.json()
        assert told["error"]["param"] == path and told["message"].startswith(f"{path}: "), (name, told)
        assert (told["error"]["status"], told["error"]["message"]) == (400, told["message"]), name
        assert answer.headers["x-ms-run-function-failed"] == "False", name
    await served.until_idle()
    assert served.server.loop.activity().num_images == 0


LIMITS = {
    "num_inference_steps": -5,
    "guidance_scale": 51,
    "height": 100,
    "width": 2048,
    "num_images_per_prompt": 17,
    "seed": -2,
    "eta": 1.5,
}


async def test_a_number_out_of_bounds_is_a_limit(served):
    for name, value in LIMITS.items():
        answer = await served.post("/score", asking(["a"], parameters={name: value}))
        is_of_the_type = name == "seed"  # the bounds of a seed are those of its type
        assert answer.status_code == (400 if is_of_the_type else 422), answer.text
        assert answer.json()["error"]["param"] == f"input_data.parameters.{name}"


JSON = "application/json"
NO_JSON = [
    (b"", JSON, 400, "body"),
    (b"{", JSON, 400, "line 1 column 2"),
    (b'{"a": NaN}', JSON, 400, "NaN"),
    (b'{"input_data": {}, "input_data": {}}', JSON, 400, "twice"),
    (b"[" * 100_000, JSON, 400, "nested"),
    (b"9" * 5000, JSON, 400, "too long"),
    (b"\xff", JSON, 400, "UTF-8"),
    (b'{"input_data": {"columns": ["prompt"], "data": ["\\ud800"]}}', JSON, 400, "valid Unicode"),
    (b"{}", "text/plain", 415, JSON),
    (b"{}", "application/json; charset=latin-1", 415, "utf-8"),
]


async def test_what_is_no_json_object_is_refused(served):
    for raw, content_type, status, said in NO_JSON:
        answer = await served.client.post("/score", content=raw, headers={"content-type": content_type})
        assert answer.status_code == status and said in answer.json()["error"]["message"], (raw[:40], answer.text)


async def test_a_packed_body_is_refused(served):
    headers = {"content-type": JSON, "content-encoding": "gzip"}
    answer = await served.client.post("/score", content=gzip.compress(b"{}"), headers=headers)
    assert answer.status_code == 415 and answer.json()["error"]["param"] == "content-encoding"


async def test_one_id_may_have_several_requests_at_once(served):
    served.server.engine.gate.clear()
    calls = [asyncio.create_task(served.post("/score", asking(["a", "b"]), x_request_id="mine")) for _ in range(3)]
    await served.server.until(lambda: served.server.loop.activity().num_requests == 6)
    served.server.engine.gate.set()
    assert [(call.status_code, call.headers["x-request-id"]) for call in await asyncio.gather(*calls)] == [(200, "mine")] * 3


@pytest.mark.parametrize("bad", ["", "ü", "x" * 101, "a\x7fb"], ids=["empty", "not ASCII", "long", "control"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/score", asking(["a"])),
        ("/v1/images/generations", {"prompt": "a"}),
        ("/", {"inputs": "a"}),
        ("/ui/generate", {"prompt": "a"}),
    ],
)
async def test_a_bad_client_id_is_refused_by_its_name(served, path, body, bad):
    headers = [(b"x-client-id", bad.encode("latin-1")), (b"content-type", b"application/json")]
    answer = await served.client.post(path, content=json.dumps(body), headers=headers)
    assert answer.status_code == 400 and "x-client-id" in answer.text
    assert served.server.loop.activity().num_requests == 0


async def test_one_calls_part_is_not_another_calls_answer(served):
    two = await served.post("/score", asking(["a", "b"]), x_idempotency_key="k")
    one = await served.post("/score", asking(["c"]), x_idempotency_key="k.0")
    assert (two.status_code, one.status_code) == (200, 200)


async def test_the_cards_sample_has_the_cards_answer(served):
    answer = await served.post("/score", CARD)
    assert answer.headers["content-type"] == "application/json"
    assert float(answer.headers["x-ms-run-fn-exec-ms"]) > 0
    first, second = answer.json()
    assert set(first) == {"prompt", "generated_image", "nsfw_content_detected"}
    assert (first["nsfw_content_detected"], second["nsfw_content_detected"]) == (False, True)
    for image in (first, second):
        drawn = picture(image["generated_image"])
        assert (drawn.format, drawn.mode, drawn.size) == ("PNG", "RGB", (64, 64))
        drawn.save(io.BytesIO(), "JPEG")  # what the command-line sample does with it
    assert picture(first["generated_image"]).getextrema() != ((0, 0),) * 3
    assert picture(second["generated_image"]).getextrema() == ((0, 0),) * 3


async def test_parameters_hold_for_every_row_and_the_row_has_the_last_word(served, caplog):
    parameters = {
        "num_inference_steps": 3,
        "num_images_per_prompt": 2,
        "seed": 7,
        "height": 128,
        "negative_prompt": "p",
        "eta": 0,
    }
    body = asking([["a", None], ["b", "mine"]], BOTH, parameters=parameters)
    body["params"] = {"seed": 7}
    seen = []
    events = served.server.dispatcher.events

    def spying(request, call, **options):
        seen.append(request)
        return events(request, call, **options)

    served.server.dispatcher.events = spying
    answer = await served.post("/score", body)
    assert [image["prompt"] for image in answer.json()] == ["a", "a", "b", "b"]
    assert answer.headers["x-mii-seeds"] == "7,8,7,8"
    assert picture(answer.json()[0]["generated_image"]).size == (64, 128)
    assert [(request.params.prompt, request.params.negative_prompt) for request in seen] == [("a", "p"), ("b", "mine")]
    assert {request.params.num_inference_steps for request in seen} == {3}


async def test_rows_share_the_batch(tmp_path):
    async with web(tmp_path, FakeEngine(max_slots=4)) as served:
        await served.post("/score", asking(["a", "b", "c", "d"], parameters={"num_inference_steps": 50}))
        assert max(len(plan.steps) for plan in served.server.engine.plans) == 4


async def test_one_call_has_its_bounds(tmp_path):
    async with web(tmp_path, max_body_bytes=2000, max_images=4, max_steps=40) as served:
        for body, status in (
            (asking(["a"] * 4), 200),
            (asking(["a"] * 5), 422),
            (asking(["a"] * 2, parameters={"num_images_per_prompt": 3}), 422),
            (asking(["a"] * 2, parameters={"num_inference_steps": 21}), 422),
            (asking(["a" * 2000]), 413),
            (asking(["a" * 3_000_000]), 413),
        ):
            answer = await served.post("/score", body)
            assert answer.status_code == status, answer.text[:500]
            assert status == 200 or answer.json()["error"]["code"] in ("limit_exceeded", "request_too_large")


async def test_a_failure_is_never_a_status_that_clients_repeat(tmp_path, caplog):
    async with web(tmp_path, max_waiting_samples=2) as served:
        served.server.engine.gate.clear()
        answer = await served.post("/score", asking(["a"] * 8))
        assert answer.status_code == 429 and "retry-after" not in answer.headers
        late = await served.post("/score", asking(["a"]), x_request_timeout_s="0.2")
        assert late.status_code == 424 and late.json()["error"]["code"] == "deadline_exceeded"
        served.server.engine.gate.set()
        await served.until_idle()
        served.server.engine.fail_sample_of("doomed")
        failed = await served.post("/score", asking(["a"]), x_request_id="doomed")
        assert failed.status_code == 424 and failed.json()["error"]["code"] == "generation_failed"
        assert failed.headers["x-ms-run-function-failed"] == "True"
        defect = served.server.dispatcher.events
        served.server.dispatcher.events = None
        broken = await served.post("/score", asking(["a"]), x_request_id="mine")
        assert broken.status_code == 424 and broken.json()["message"] == "internal error, request id mine"
        assert "Traceback" in caplog.text and "Traceback" not in broken.text
        served.server.dispatcher.events = defect
        await served.server.dispatcher.drain(1)
        assert (await served.post("/score", asking(["a"]))).status_code == 503
        assert (await served.client.get("/readyz")).status_code == 503


async def test_a_row_that_fails_takes_the_others_along(tmp_path):
    async with web(tmp_path, FakeEngine(max_slots=2)) as served:
        served.server.engine.fail_sample_of("mine.1")
        body = asking(["a", "b", "c"], parameters={"num_inference_steps": 1000})
        assert (await served.post("/score", body, x_request_id="mine")).status_code == 424
        await served.until_idle()
        assert served.server.loop.activity().num_images == 0


@pytest.mark.parametrize("body", [asking(["a"]), asking(["a", "b", "c"])], ids=["one row", "three rows"])
async def test_who_hangs_up_frees_the_slots(served, body):
    body["input_data"]["parameters"] = {"num_inference_steps": 1000}
    _, writer = await served.start("/score", body)
    await served.server.until(lambda: served.server.loop.activity().num_running)
    writer.close()
    await served.until_idle()
    assert served.server.loop.activity().num_images == 0
    await served.server.until(lambda: counted_cancelled(served) == 1)


def counted_cancelled(served: Web) -> float:
    metrics = served.server.dispatcher.metrics.requests.labels("POST /score", "CANCELLED")
    return metrics._value.get()


class TestHeaders:
    async def test_ids_come_back(self, served):
        answer = await served.post(
            "/score", asking(["a"]), x_request_id="mine", x_ms_client_request_id="client", traceid="trace"
        )
        told = answer.headers
        assert (told["x-request-id"], told["x-ms-request-id"], told["x-ms-client-request-id"]) == ("mine", "client", "client")
        assert told["traceid"] == "trace" and told["x-ms-server-version"].startswith("mii_serve/")
        plain = await served.post("/score", asking(["a"]), azureml_model_deployment="blue")
        assert len(plain.headers["x-request-id"]) == 36 and plain.headers["x-ms-request-id"] == plain.headers["x-request-id"]
        assert (await served.post("/score", [], x_ms_request_id="old")).headers["x-ms-request-id"] == "old"

    async def test_one_that_is_too_long_or_no_id_is_refused(self, served):
        for name in ("x-request-id", "x-ms-client-request-id", "traceid"):
            assert (await served.post("/score", asking(["a"]), **{name: "i" * 101})).status_code == 431
            assert (await served.post("/score", asking(["a", "b"]), **{name: "i" * 100})).status_code == 200
        assert (await served.post("/score", asking(["a"]), x_request_id="a b")).status_code == 400

    async def test_the_same_key_is_worked_on_once(self, served):
        answers = [await served.post("/score", asking(["a", "b"]), x_idempotency_key="k") for _ in range(2)]
        assert answers[0].json() == answers[1].json()
        assert served.server.loop.activity().num_images == 2

    async def test_a_timeout_is_a_number(self, served):
        for bad in ("0", "-1", "soon", "nan", "1e3"):
            assert (await served.post("/score", asking(["a"]), x_request_timeout_s=bad)).status_code == 400


async def test_a_call_is_counted_and_logged_without_its_prompt(served, caplog):
    with caplog.at_level(logging.INFO, logger="mii_serve"):
        await served.post("/score", asking(["a secret thought"], parameters={"seed": 9}), x_request_id="mine")
        await served.post("/score", asking([]))
    text = (await served.client.get("/metrics")).text
    assert counted(text, "mii_serve_requests_total", method="POST /score", code="OK") == 1
    assert counted(text, "mii_serve_requests_total", method="POST /score", code="INVALID_ARGUMENT") == 1
    told = [record.request for record in caplog.records if record.name == "mii_serve.server.access_log"]
    assert (told[0]["request_id"], told[0]["code"], told[0]["seed"], told[0]["http_status"]) == ("mine", "OK", 9, 200)
    assert (told[1]["code"], told[1]["http_status"]) == ("INVALID_ARGUMENT", 400)
    assert "secret" not in caplog.text + text


class TestBlocked:
    """What content safety says reaches the caller in the form that existing clients read."""

    @pytest.fixture
    async def strict(self, tmp_path):
        async with web(tmp_path, refuse_blocked_score=True) as running:
            yield running

    def block(self, served: Web, monkeypatch) -> None:
        async def events(request, call, **options):
            raise ContentBlockedError("prompt", {"Violence": 4}, stage="input")
            yield

        monkeypatch.setattr(served.server.dispatcher, "events", events)

    async def test_input_is_an_empty_object_with_headers(self, served, monkeypatch):
        self.block(served, monkeypatch)
        answer = await served.post("/score", asking(["a"]))
        assert (answer.status_code, answer.text) == (200, "{}")
        told = {name: answer.headers[f"x-mii-blocked{name}"] for name in ("", "-category", "-severity")}
        assert told == {"": "input", "-category": "Violence", "-severity": "4"}

    async def test_input_is_400_where_the_operator_says_so(self, strict, monkeypatch):
        self.block(strict, monkeypatch)
        answer = await strict.post("/score", asking(["a"]))
        assert answer.status_code == 400 and answer.headers["x-mii-blocked"] == "input"
        assert answer.json()["error"]["code"] == "content_filter"

    async def test_an_output_is_an_empty_text(self, served, monkeypatch):
        events = served.server.dispatcher.events

        async def blocking(request, call, **options):
            async for event in events(request, call, **options):
                is_second = isinstance(event, ImageReady) and event.image_index == 1
                yield replace(event, moderation_blocked=True) if is_second else event

        monkeypatch.setattr(served.server.dispatcher, "events", blocking)
        answer = await served.post("/score", asking(["a"], parameters={"num_images_per_prompt": 2}))
        first, second = answer.json()
        assert first["generated_image"] and second["generated_image"] == ""
        assert answer.headers["x-mii-blocked"] == "output"


async def test_info_shows_the_ranks_of_a_replica_and_its_kernels(served, monkeypatch):
    described = await served.server.dispatcher.server_info()

    async def server_info():
        return replace(described, num_ranks=2, parallelism="rows", engine_kernels="fused: attention triton 8")

    monkeypatch.setattr(served.server.dispatcher, "server_info", server_info)
    said = (await served.client.get("/info")).json()
    assert (said["model_name"], said["num_ranks"], said["parallelism"]) == ("fake", 2, "rows")
    assert said["engine_kernels"] == "fused: attention triton 8"


async def test_probes_the_description_and_unknown_routes(served):
    root = await served.client.get("/")
    assert (root.status_code, root.json()) == (200, "healthy")
    assert (await served.client.get("/livez")).text == "ok"
    assert (await served.client.get("/readyz")).status_code == 200
    names = {"model_type": "stable-diffusion", "model_provider_name": "mii_serve", "model_name": "fake"}
    assert (await served.client.get("/info")).json() == names
    for query, status in (("", 200), ("?version=3", 200), ("?version=2", 404), ("?version=x", 400)):
        assert (await served.client.get(f"/swagger.json{query}")).status_code == status
    nowhere = await served.client.get("/nowhere")
    assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (404, "not_found")
    wrong = await served.client.get("/score")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["code"] == "method_not_allowed"

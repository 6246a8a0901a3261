"""The load generator against real sockets: our own server with the fake engine, and small doubles that misbehave on purpose."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
from collections.abc import AsyncIterator, Callable

import grpc
import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from PIL import Image
from servers import RunningServer, running_server
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mii_serve.bench.grpc_driver import GrpcDriver
from mii_serve.bench.http_client import http_address
from mii_serve.bench.http_driver import HttpDriver
from mii_serve.bench.load import LoadLimits
from mii_serve.bench.mii_driver import METHOD, ImageReply, MiiDriver, Text2ImageRequest
from mii_serve.bench.mix import parse_mix
from mii_serve.bench.run import Loop, Plan, measure
from mii_serve.bench.summary import summary
from mii_serve.config import DeployConfig
from mii_serve.gateway.app import serve_http
from mii_serve.server.keys import KeyRing

MIX = parse_mix("2: num_inference_steps=3, height=64, width=64; 1: num_inference_steps=2, height=64, width=72")


def plan(loop: Loop, **changes) -> Plan:
    return Plan(
        **{"loop": loop, "mix": MIX, "limits": LoadLimits(max_requests=12, timeout_s=PATIENCE_S), "num_warmup": 2, **changes}
    )


CLOSED = Loop(kind="closed", callers=3)
OPEN = Loop(kind="poisson", rate=200.0)


@pytest.mark.parametrize("loop", [CLOSED, OPEN], ids=str)
async def test_our_own_server_is_measured_from_inside_and_outside(tmp_path, loop: Loop):
    async with (
        running_server(tmp_path, FakeEngine(), max_waiting_samples=64) as server,
        serve_http(DeployConfig.load({"http_port": 0}), server.dispatcher, KeyRing(None)) as http,
    ):
        driver = GrpcDriver(server.target)
        told = await measure(plan(loop, preview_every=1, metrics=http_address(http), sample_size=2), driver)
        await driver.close()
    figures = summary(told.records, target_s=20.0)
    assert figures["codes"] == {"OK": 12}
    for name in ("total", "queue", "first_step"):
        assert figures["latency_s"][name]["count"] == 12
    assert 1 <= figures["latency_s"]["first_preview"]["count"] <= 12  # a busy server shows less
    for record in told.records:
        assert 0 <= record.queue_s <= record.first_step_s <= record.total_s
    steps = {"3 steps, 64x64": 3, "2 steps, 72x64": 2}
    calls = sum(steps[record.kind] for record in told.records)
    assert told.observed["num_calls"] == calls  # one slot: a call for each step, and none of the warm-up's
    assert told.observed["images_per_call"] == 1.0
    assert sum(one["num_calls"] for one in told.observed["step_ms_by_batch"].values()) == calls
    assert {one.request.kind for one in told.sampled} == set(steps)


async def test_refusals_and_bad_requests_are_told_apart(server: RunningServer):
    server.engine.gate.clear()  # nothing moves, so that the line fills up
    driver = GrpcDriver(server.target)
    ended = []
    all_at_once = plan(Loop(kind="constant", rate=1000.0), num_warmup=0)
    load = asyncio.create_task(measure(all_at_once, driver, on_record=ended.append))
    await server.until(lambda: len(ended) == 3)  # one runs, eight wait, and nobody else is let in
    server.engine.gate.set()
    told = await load
    codes = summary(told.records, target_s=None)["codes"]
    assert codes == {"OK": 9, "RESOURCE_EXHAUSTED": 3}
    assert "RESOURCE_EXHAUSTED" in told.examples
    wrong = parse_mix("1: num_inference_steps=0; 1: height=3000000000, width=8")
    told = await measure(plan(CLOSED, mix=wrong, num_warmup=0), driver)
    await driver.close()
    assert summary(told.records, target_s=None)["codes"] == {"INVALID_ARGUMENT": 12}
    assert summary(told.records, target_s=None)["num_failed"] == 12


async def test_a_server_that_is_gone_fails_every_request_and_the_load_ends():
    for driver in (GrpcDriver("127.0.0.1:1"), MiiDriver("127.0.0.1:1"), HttpDriver(http_address("127.0.0.1:1"))):
        told = await measure(plan(CLOSED, metrics=http_address("127.0.0.1:1")), driver)
        await driver.close()
        assert summary(told.records, target_s=None)["codes"] == {"UNREACHABLE": 12}
        assert told.observed["text"].startswith("no metrics")
        assert told.sampled == []


async def test_a_server_that_says_it_is_not_available_refuses(server: RunningServer):
    await server.dispatcher.drain(0.1)
    driver = GrpcDriver(server.target)
    told = await measure(plan(CLOSED, num_warmup=0), driver)
    await driver.close()
    assert summary(told.records, target_s=None)["codes"] == {"UNAVAILABLE": 12}
    assert summary(told.records, target_s=None)["num_refused"] == 12


# ---- HTTP ----------------------------------------------------------------------------------------------------------


def png(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (9, 8, 7)).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


@contextlib.asynccontextmanager
async def http_double(answer: Callable[[Request], object]) -> AsyncIterator[str]:
    """A server that answers `POST /v1/images/generations` as it is told."""
    import uvicorn

    app = Starlette(routes=[Route("/v1/images/generations", answer, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    try:
        yield http_address(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
    finally:
        server.should_exit = True
        await serving


async def test_the_images_api_gets_what_openai_clients_send_and_the_rest_beside_it():
    seen = []

    async def answer(request: Request) -> Response:
        seen.append((await request.json(), request.headers.get("authorization"), request.client.port))
        width, height = map(int, seen[-1][0]["size"].split("x"))
        return JSONResponse({"created": 1, "data": [{"b64_json": png(width, height)}]})

    async with http_double(answer) as url:
        driver = HttpDriver(url, headers={"authorization": "Bearer k"})
        told = await measure(plan(CLOSED), driver)
        await driver.close()
    assert summary(told.records, target_s=None)["codes"] == {"OK": 12}
    asked, key, _ = seen[-1]
    assert key == "Bearer k"
    assert asked["size"] in ("64x64", "72x64")
    assert {"prompt", "seed", "num_inference_steps"} <= set(asked)
    assert (asked["n"], asked["response_format"]) == (1, "b64_json")
    assert len({port for _, _, port in seen}) <= 3  # connections are kept


async def test_statuses_garbage_and_hang_ups_are_what_they_are():
    answers = iter([
        JSONResponse({"error": {"message": "full", "code": "rate_limit_exceeded"}}, status_code=429),
        Response("<html>", status_code=502),
        Response("not json"),
        JSONResponse({"data": [{"b64_json": "***"}]}),
        JSONResponse({"data": []}),
        Response(b"x", headers={"content-length": "10"}),
    ])  # fmt: skip

    async def answer(request: Request) -> Response:
        return next(answers)

    async with http_double(answer) as url:
        driver = HttpDriver(url)
        told = await measure(plan(Loop(kind="closed", callers=1), limits=LoadLimits(max_requests=6), num_warmup=0), driver)
        await driver.close()
    codes = [record.code for record in told.records]
    assert codes == ["HTTP_429", "HTTP_502", "BAD_ANSWER", "BAD_ANSWER", "BAD_ANSWER", "UNREACHABLE"]
    assert summary(told.records, target_s=None)["num_refused"] == 1
    assert told.examples["HTTP_429"] == "full"


async def test_a_slow_answer_ends_at_its_deadline():
    async def answer(request: Request) -> Response:
        await asyncio.sleep(1)
        return Response()

    async with http_double(answer) as url:
        driver = HttpDriver(url)
        limits = LoadLimits(max_requests=2, timeout_s=0.3)
        told = await measure(plan(CLOSED, limits=limits, num_warmup=0), driver)
        await driver.close()
    assert summary(told.records, target_s=None)["codes"] == {"DEADLINE_EXCEEDED": 2}


async def test_server_sent_events_give_the_first_preview():
    async def answer(request: Request) -> Response:
        asked = await request.json()
        assert (asked["stream"], asked["partial_images"]) == (True, 3)
        width, height = map(int, asked["size"].split("x"))

        async def events() -> AsyncIterator[str]:
            for kind in ("image_generation.partial_image", "image_generation.completed"):
                data = json.dumps({"type": kind, "b64_json": png(width, height)})
                text = f"event: {kind}\r\ndata: {data}\r\n\r\n"
                yield text[:40]  # an event may come in pieces
                yield text[40:]
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async with http_double(answer) as url:
        driver = HttpDriver(url)
        told = await measure(plan(CLOSED, preview_every=2, num_warmup=0), driver)
        await driver.close()
    assert summary(told.records, target_s=None)["latency_s"]["first_preview"]["count"] == 12


async def test_an_error_among_the_events_is_the_requests_code():
    async def answer(request: Request) -> Response:
        return Response('event: error\ndata: {"error": {"message": "m", "code": "oh"}}\n\n', media_type="text/event-stream")

    async with http_double(answer) as url:
        driver = HttpDriver(url)
        told = await measure(plan(CLOSED, preview_every=2, num_warmup=0), driver)
        await driver.close()
    assert summary(told.records, target_s=None)["codes"] == {"oh": 12}


# ---- MII's wire ----------------------------------------------------------------------------------------------------


async def test_miis_wire_gets_kwargs_by_type_and_gives_raw_pictures():
    seen = []

    async def reply(request, context):
        seen.append(request)
        if len(seen) == 3:
            await context.abort(grpc.StatusCode.UNKNOWN, "Exception calling application: no")
        kwargs = request.query_kwargs
        width, height = kwargs["width"].ivalue, kwargs["height"].ivalue
        return ImageReply(images=[bytes(3 * width * height)], mode="RGB", size_w=width, size_h=height)

    handler = grpc.unary_unary_rpc_method_handler(reply, Text2ImageRequest.FromString, ImageReply.SerializeToString)
    service, method = METHOD.strip("/").split("/")
    double = grpc.aio.server()
    double.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = double.add_insecure_port("127.0.0.1:0")
    await double.start()
    driver = MiiDriver(f"127.0.0.1:{port}")
    mix = parse_mix("1: num_inference_steps=3, height=64, width=72, guidance_scale=7.5, negative_prompt=x")
    told = await measure(plan(CLOSED, mix=mix, num_warmup=0), driver)
    await driver.close()
    await double.stop(0)
    assert summary(told.records, target_s=None)["codes"] == {"OK": 11, "UNKNOWN": 1}
    assert (list(seen[0].negative_prompt), len(seen[0].prompt)) == (["x"], 1)
    kinds = {name: value.WhichOneof("oneof_values") for name, value in seen[0].query_kwargs.items()}
    assert kinds == {
        "num_inference_steps": "ivalue", "height": "ivalue", "width": "ivalue", "guidance_scale": "fvalue", "seed": "ivalue",
    }  # fmt: skip
    assert told.sampled[0].picture.open().size == (72, 64)

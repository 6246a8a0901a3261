"""Callers without keys share by their addresses; names that they make up gain nothing."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from fake_engine import FakeEngine
from prometheus_client.parser import text_string_to_metric_families
from web import client_from, web

NUM_EACH = 24
MAX_NEW_SERIES = 400
"""For whatever a caller without pictures can bring about."""


MADE_UP = [("x-client-id", "n{}"), ("x-forwarded-for", "10.0.0.{}"), ("forwarded", "for=10.0.0.{}")]


@pytest.fixture
async def served(tmp_path):
    async with web(tmp_path, FakeEngine(max_slots=1)) as running:
        yield running


@pytest.mark.parametrize(("header", "name"), MADE_UP)
async def test_a_crowd_of_made_up_names_does_not_hold_up_another_address(served, header, name):
    served.server.engine.gate.clear()
    async with client_from(served, "127.0.0.1") as greedy, client_from(served, "127.0.0.2") as modest:
        crowd = [
            asyncio.create_task(
                greedy.post("/", json={"inputs": "a"}, headers={header: name.format(i), "x-request-id": "greedy"})
            )
            for i in range(NUM_EACH)
        ]
        await served.server.until(lambda: served.server.loop.activity().num_requests == NUM_EACH)
        others = [
            asyncio.create_task(modest.post("/", json={"inputs": "a"}, headers={"x-request-id": "modest"})) for _ in range(4)
        ]
        await served.server.until(lambda: served.server.loop.activity().num_requests == NUM_EACH + 4)
        served.server.engine.gate.set()
        answers = await asyncio.gather(*crowd, *others)
    assert {answer.status_code for answer in answers} == {200}
    joined = [sample.id.request_id.partition(" ")[0] for plan in served.server.engine.plans for sample in plan.joins]
    places = [place for place, name in enumerate(joined) if name == "modest"]
    assert places[-1] <= 2 * 4 + 1, joined


async def test_what_callers_choose_makes_no_series_without_end(served):
    async def num_series() -> int:
        text = (await served.client.get("/metrics")).text
        return sum(len(family.samples) for family in text_string_to_metric_families(text))

    before = await num_series()
    paths = ["/score", "/v1/models/", "/models/", "/openai/deployments/", "/ui/", "/v1/images/"]
    for i, (method, path) in enumerate(itertools.product(["GET", "POST", "PUT", "BREW", "OPTIONS"], paths * 4)):
        await served.client.request(
            method, f"{path}x{i}", json={"a": i}, headers={"x-client-id": f"c{i}", "x-request-id": f"r{i}"}
        )
    for i in range(40):
        method = served.server.channel.unary_unary(f"/mii_serve.v1.ImageGeneration/Method{i}")
        with pytest.raises(Exception, match="UNIMPLEMENTED"):
            await method(b"")
    for height in range(64, 513, 64):
        for width in range(64, 513, 64):
            params = {"inputs": "a", "parameters": {"height": height, "width": width, "num_inference_steps": 1}}
            assert (await served.post("/", params)).status_code == 200
    assert await num_series() - before < MAX_NEW_SERIES

"""/metrics of a front with two replicas: valid, right, without a prompt, and there when a replica is not."""

from __future__ import annotations

import asyncio
import logging
import urllib.request

import grpc
import pytest
from patience import PATIENCE_S
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from replicas import KILLED, Deployment, deployment_of, events_of, request

from mii_serve.config import DeployConfig
from mii_serve.gateway.app import serve_http
from mii_serve.replica.loop import ReplicaLoop
from mii_serve.server.keys import KeyRing

PROMETHEUS_ACCEPTS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"


@pytest.fixture
async def two(tmp_path):
    async with deployment_of(tmp_path, 2) as deployment:
        yield deployment


async def scraped(deployment: Deployment) -> dict[tuple, float]:
    """Every sample by name and labels; a family may be there only once."""
    text = (await deployment.dispatcher.metrics_text()).decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    assert "a red circle" not in text
    samples = [sample for family in families for sample in family.samples]
    found = {(sample.name, *sorted(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples)
    assert all(name.startswith(("mii_serve_", "process_")) for name, *_ in found)
    return found


def total(samples: dict[tuple, float], name: str, **labels: str) -> float:
    return sum(value for key, value in samples.items() if key[0] == name and set(labels.items()) <= set(key[1:]))


async def test_what_was_done_is_counted(two):
    await two.stub.Generate(request(num_images_per_prompt=4))
    await events_of(two.stub.GenerateStream(request(prompt="a red circle and a skull")))
    for bad in ({"num_inference_steps": -1}, {"prompt": ""}):
        with pytest.raises(grpc.aio.AioRpcError):
            await two.stub.Generate(request(**bad))
    samples = await scraped(two)
    assert total(samples, "mii_serve_requests_total", method="Generate", code="OK") == 1
    assert total(samples, "mii_serve_requests_total", method="GenerateStream", code="OK") == 1
    assert total(samples, "mii_serve_requests_total", code="INVALID_ARGUMENT") == 2
    assert total(samples, "mii_serve_request_duration_seconds_count") == 4
    assert total(samples, "mii_serve_queue_seconds_count") == 2
    assert total(samples, "mii_serve_images_total") == 5
    assert (
        total(samples, "mii_serve_images_total", replica="0") > 0 and total(samples, "mii_serve_images_total", replica="1") > 0
    )
    assert total(samples, "mii_serve_images_flagged_total") == 1
    assert total(samples, "mii_serve_engine_info", engine="fake", dtype="fp32", is_fallback="false") == 2
    assert total(samples, "mii_serve_batch_size_sum") == 5 * 4, "images × steps"
    assert total(samples, "mii_serve_step_duration_seconds_count", engine="fake", size_px="64") > 0
    assert total(samples, "mii_serve_stage_duration_seconds_count", stage="encode_image") == 5
    assert total(samples, "mii_serve_stage_duration_seconds_count", stage="denoise") > 0
    assert total(samples, "mii_serve_replicas_ready") == 2
    assert total(samples, "mii_serve_requests_running") == 0


async def test_a_lost_replica_is_shown_and_spoils_nothing(two):
    two.hold()
    call = asyncio.create_task(events_of(two.stub.GenerateStream(request())))
    await two.until(lambda: sum(two.images_on().values()) == 1)
    [index] = [index for index, running in two.images_on().items() if running]
    samples = await scraped(two)
    assert total(samples, "mii_serve_requests_running") == 1
    assert total(samples, "mii_serve_images_running") + total(samples, "mii_serve_images_waiting") == 1
    await two.lose(index, KILLED)
    two.release()
    await call
    samples = await scraped(two)
    assert total(samples, "mii_serve_replicas_ready") == 1
    assert total(samples, "mii_serve_requests_restarted_total") == 1
    assert not [key for key in samples if ("replica", str(index)) in key[1:] and key[0].startswith("mii_serve_images")]


async def test_who_leaves_is_counted_by_where_they_were(two):
    call = two.stub.GenerateStream(request(num_inference_steps=1000))
    async for event in call:
        if event.HasField("step"):
            break
    call.cancel()
    async with asyncio.timeout(PATIENCE_S):
        while not total(await scraped(two), "mii_serve_cancelled_total", where="running"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert total(await scraped(two), "mii_serve_requests_total", code="CANCELLED") == 1


async def test_queued_work_is_told_in_seconds(two):
    await two.stub.Generate(request())
    assert total(await scraped(two), "mii_serve_queued_work_seconds") == 0
    two.hold()
    call = asyncio.create_task(events_of(two.stub.GenerateStream(request(num_inference_steps=1000))))
    await two.until(lambda: sum(two.images_on().values()) == 1)

    def busy() -> list[ReplicaLoop]:
        return [r.loop for r in two.replicas.values() if r.loop.activity().num_running]

    await two.until(busy)
    if busy()[0].activity().num_turns:  # the one with a measured pace
        assert total(await scraped(two), "mii_serve_queued_work_seconds") > 0
    two.release()
    await call


async def test_they_are_served_over_http(two):
    await two.stub.Generate(request())
    async with serve_http(DeployConfig.load({"http_port": 0}), two.dispatcher, KeyRing()) as address:
        answer = await asyncio.to_thread(urllib.request.urlopen, f"http://{address}/metrics", timeout=PATIENCE_S)
        with answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            families = {family.name for family in text_string_to_metric_families(answer.read().decode())}
        assert {"mii_serve_requests", "mii_serve_images", "mii_serve_build_info"} <= families
        asking = urllib.request.Request(f"http://{address}/metrics", headers={"Accept": PROMETHEUS_ACCEPTS})
        answer = await asyncio.to_thread(urllib.request.urlopen, asking, timeout=PATIENCE_S)
        with answer:
            assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
            text = answer.read().decode()
    assert {family.name for family in openmetrics.text_string_to_metric_families(text)} == families


async def test_front_and_replicas_tell_of_their_processes_and_nothing_of_a_gpu_that_is_not_there(two):
    samples = await scraped(two)
    memory = {dict(key[1:]).get("replica") for key in samples if key[0] == "process_resident_memory_bytes"}
    assert memory == {None, "0", "1"} and total(samples, "process_cpu_seconds_total") > 0
    assert not [key for key in samples if key[0] == "mii_serve_gpu_memory_bytes"]


async def test_each_request_has_one_line_without_its_prompt(two, caplog):
    with caplog.at_level(logging.INFO, logger="mii_serve"):
        await two.stub.Generate(request(seed=77), metadata=(("x-request-id", "mine"),))
        with pytest.raises(grpc.aio.AioRpcError):
            await two.stub.Generate(request(height=-1))
        await two.until(lambda: len(lines(caplog)) == 2)
    good, bad = lines(caplog)
    told = good.request
    assert (told["request_id"], told["code"], told["seed"], told["num_inference_steps"]) == ("mine", "OK", 77, 4)
    assert told["seconds"] >= told["queued_s"] >= 0
    assert bad.request["code"] == "INVALID_ARGUMENT"
    assert "a red circle" not in caplog.text


def lines(caplog) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "mii_serve.server.access_log"]

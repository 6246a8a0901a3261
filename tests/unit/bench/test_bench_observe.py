"""Figures of the server itself, from two looks at its metrics, as our own instruments write them."""

from __future__ import annotations

import pytest

from mii_serve.bench.observe import between, read_metrics
from mii_serve.metrics import FrontMetrics, ReplicaMetrics, together


def test_what_happened_between_two_looks():
    front, replicas = FrontMetrics(), [ReplicaMetrics(), ReplicaMetrics()]

    def look():
        return read_metrics(together(front, {i: replica.text() for i, replica in enumerate(replicas)}).decode())

    replicas[0].turn("native", (64, 64), 8, {"denoise": 9.0})  # before the load, and no part of it
    before = look()
    replicas[0].turn("native", (64, 64), 3, {"denoise": 0.030, "decode": 0.5})
    replicas[0].turn("native", (64, 64), 4, {"denoise": 0.040})
    replicas[1].turn("native", (32, 64), 1, {"denoise": 0.020})
    front.queue.observe(0.25)
    told = between(before, look())
    assert (told["num_calls"], told["images_per_call"]) == (3, pytest.approx(8 / 3))
    assert told["step_ms"] == pytest.approx(30.0)
    by_batch = told["step_ms_by_batch"]
    assert list(by_batch) == ["1", "4"]
    assert by_batch["4"] == {"num_calls": 2, "mean_ms": pytest.approx(35.0), "p95_at_most_ms": 50.0}
    assert told["stage_s"] == {"decode": pytest.approx(0.5), "denoise": pytest.approx(0.09)}
    assert told["queue_s"] == pytest.approx(0.25)


def test_a_server_that_did_nothing_tells_nothing():
    text = together(FrontMetrics(), {0: ReplicaMetrics().text()}).decode()
    assert between(read_metrics(text), read_metrics(text)) == {}


def test_another_servers_metrics_are_no_harm():
    other = 'http_requests_total{code="200"} 3\n# HELP a b\n# TYPE a gauge\na 1\n'
    assert between(read_metrics(other), read_metrics(other)) == {}

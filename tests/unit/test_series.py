"""However callers choose, the metrics have a bounded number of series."""

from __future__ import annotations

import random

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mii_serve.metrics import MAX_KEY_NAMES, FrontMetrics, ReplicaMetrics, size_class_px, together

MAX_SERIES = 8 * 8
"""Sizes of 8 to 1024 px and batches of 1 to 128."""


def test_a_thousand_sizes_and_batches_make_few_series():
    metrics, chance = ReplicaMetrics(), random.Random(1)
    for height in range(8, 1025, 8):
        for width in range(8, 1025, 8):
            metrics.turn("native", (height, width), chance.randint(1, 128), {"denoise": 0.01})
    text = together(FrontMetrics(), {0: metrics.text()}).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    steps = families["mii_serve_step_duration_seconds"]
    counts = [sample for sample in steps.samples if sample.name.endswith("_count")]
    assert sum(sample.value for sample in counts) == 128 * 128
    assert len(counts) <= MAX_SERIES


def test_keys_that_come_and_go_make_few_series():
    metrics = FrontMetrics()
    for number in range(3 * MAX_KEY_NAMES):
        metrics.key_request(f"key-{number % (2 * MAX_KEY_NAMES)}", "OK", 0.5, 2)
    text = together(metrics, {}).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    names = {sample.labels["key"]: sample.value for sample in families["mii_serve_key_images"].samples}
    assert len(names) == MAX_KEY_NAMES + 1 and sum(names.values()) == 6 * MAX_KEY_NAMES
    assert names["key-0"] == 4 and names["(other)"] == 2 * MAX_KEY_NAMES


def test_a_slow_call_leads_to_its_trace_where_the_reader_takes_openmetrics():
    metrics = FrontMetrics()
    metrics.request_duration.labels("Generate").observe(3.0, {"trace_id": "ab" * 16})
    assert '# {trace_id="abab' in together(metrics, {}, "application/openmetrics-text").decode()
    assert "trace_id" not in together(metrics, {}).decode()


@pytest.mark.parametrize(
    ("height", "width", "side"),
    [(8, 8, 8), (64, 64, 64), (64, 72, 128), (512, 512, 512), (512, 768, 1024), (256, 1024, 512), (1024, 1024, 1024)],
)
def test_a_size_is_told_by_the_square_it_fits_into(height, width, side):
    assert size_class_px(height, width) == side

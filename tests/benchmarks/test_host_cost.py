"""The benchmark of a turn's host cost drives real turns, of the batch it says. How long they take is not judged here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import host_cost
import pytest

from mii_serve.config import LimitsConfig
from mii_serve.models import load_model


@pytest.mark.parametrize("num_samples", [1, 3])
def test_every_turn_is_a_replay_of_the_whole_batch(num_samples, monkeypatch):
    monkeypatch.setattr(host_cost, "NUM_STEPS", 300)
    model = load_model("demo", revision=None, dtype="fp32", device="cpu", limits=LimitsConfig())
    with ThreadPoolExecutor(1) as thread:
        row = host_cost.measure(model, num_samples, 5, 2, thread)
    assert row["num_samples"] == num_samples
    assert 0 < row["cpu_ms"]["least"] <= row["cpu_ms"]["median"]

"""Which engine `auto` takes follows what is timed, once on a kind of device. Device, kernels and clock are doubles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from operation_doubles import fast_device, tiny_model

from mii_serve.engine.engine_times import EngineTimes, newest_times
from mii_serve.engine.kernels import comparison
from mii_serve.engine.kernels.comparison import compare
from mii_serve.engine.kernels.fused.install import Installed
from mii_serve.engine.kernels.native import NativeKernels


@pytest.fixture(scope="module")
def loaded() -> Any:
    return tiny_model()


@pytest.fixture
def model(monkeypatch, loaded) -> Any:
    """Its UNet has DeepSpeed's blocks in name only."""

    def install(model, *, max_slots, around):
        kernels = NativeKernels(model.pipeline.unet)
        kernels.name = "deepspeed"
        return Installed(kernels, "")

    monkeypatch.setattr(comparison, "install_kernels", install)
    monkeypatch.setattr(comparison.importlib.metadata, "version", lambda name: "0.19.8")
    return loaded


class Clock:
    """A call takes what its kernels cost, for each row of it."""

    def __init__(self, **cost: float) -> None:
        self.cost, self.num_timed = cost, 0

    def time_ms(self, call: Any) -> float:
        self.num_timed += 1
        num_rows = len(call.args[2])
        if (cost := self.cost[call.func.__self__.name] * num_rows) > 100:
            raise torch.OutOfMemoryError
        return cost


def measured(model: Any, folder: Path, clock: Clock, **about: Any) -> Any:
    device = fast_device()[0]
    device = replace(device, about={**device.about, **about})
    return compare(model, device, max_slots=4, time_ms=clock.time_ms, folder=folder)


@pytest.mark.parametrize(("deepspeed", "faster"), [(0.9, "deepspeed"), (1.1, "native"), (1.0, "native")])
def test_the_faster_one_is_known_afterwards_and_not_timed_again(model, tmp_path, deepspeed, faster):
    clock = Clock(native=1.0, deepspeed=deepspeed)
    first = measured(model, tmp_path, clock)
    assert first.times == EngineTimes(device="double", native_ms=(2.0, 8.0), deepspeed_ms=(2 * deepspeed, 8 * deepspeed))
    assert first.times.faster == faster and first.deepspeed is not None
    again = measured(model, tmp_path, clock)
    assert (again.times, again.deepspeed, clock.num_timed) == (first.times, None, 4)
    assert newest_times(tmp_path) == first.times
    assert measured(model, tmp_path, clock, torch="2").deepspeed is not None, "another version is timed again"


def test_what_one_of_them_has_no_memory_for_is_left_out(model, tmp_path):
    assert measured(model, tmp_path, Clock(native=1.0, deepspeed=20.0)).times.deepspeed_ms == (40.0,)


def test_a_damaged_file_is_measured_again(model, tmp_path):
    measured(model, tmp_path, Clock(native=1.0, deepspeed=2.0))
    [file] = tmp_path.glob("*.engines")
    file.write_text(file.read_text()[:-30])
    assert newest_times(tmp_path) is None
    assert measured(model, tmp_path, Clock(native=1.0, deepspeed=2.0)).deepspeed is not None

"""Which fused operation runs in which way: the fastest right one of each shape, measured once. The device is a double."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from operation_doubles import Clock, Way, fast_device, tiny_model

from mii_serve.engine.kernel_choices import TORCH, Choice, ChoiceFile, Measurement, kept_choices
from mii_serve.engine.kernels.fused.choice import ChosenOperations
from mii_serve.engine.kernels.fused.forward import FusedKernels
from mii_serve.engine.kernels.fused.install import Device, install, native_kernels
from mii_serve.engine.kernels.fused.operations import TorchOperations
from mii_serve.engine.kernels.fused.vae import FusedDecoder
from mii_serve.engine.kernels.native import NativeKernels
from mii_serve.engine.kernels.sampler import TorchSampler
from mii_serve.models import LoadedModel

NAMES = ("group_norm", "upsample", "layer_norm", "linear_geglu", "attention")


@pytest.fixture
def model() -> LoadedModel:
    return tiny_model()


def put_under(model: LoadedModel, device: Device, folder: Path) -> Any:
    return install(model, device, num_samples=(1, 2), folder=folder)


def choice_in(folder: Path) -> dict[str, Any]:
    [file] = folder.glob("*.json")
    return json.loads(file.read_text())


def test_the_fastest_way_that_is_right_is_used(model, tmp_path):
    device, way = fast_device()
    installed = put_under(model, device, tmp_path)
    assert isinstance(installed.kernels, FusedKernels) and isinstance(model.pipeline.vae.decoder, FusedDecoder)
    assert set(way.calls) == set(NAMES)
    assert all(f"{name} fast " in installed.about for name in (*NAMES, "sampler")) and "torch" not in installed.about
    assert installed.kernels.sampler is device.samplers["fast"]


def test_a_slower_way_is_not_used(model, tmp_path):
    clock = Clock()
    slow = Way(clock, 2.0)
    installed = put_under(
        model, Device(about={"device": "d"}, ways={"slow": slow}, samplers={}, time_ms=clock.time_ms), tmp_path
    )
    assert "slow" not in installed.about
    before = len(slow.calls)
    model.pipeline.vae.decode(torch.randn(1, model.pipeline.vae.config.latent_channels, 8, 8))
    assert len(slow.calls) == before


@pytest.mark.parametrize("name", ["layer_norm", "attention", "sampler"])
def test_a_wrong_way_is_refused_with_the_reason(model, tmp_path, name):
    installed = put_under(model, fast_device(wrong=name)[0], tmp_path)
    assert f"not {name}: fast (0.01 off for " in installed.about
    assert (type(installed.kernels.sampler) is TorchSampler) == (name == "sampler")
    assert f"{name} torch " in installed.about and "group_norm fast " in installed.about


def test_a_way_that_fails_is_refused_with_the_reason_and_not_tried_again(model, tmp_path):
    device, way = fast_device(failing="upsample")
    installed = put_under(model, device, tmp_path)
    assert "not upsample: fast (RuntimeError: PassManager::run failed)" in installed.about
    assert way.calls.count("upsample") == 1


def test_what_was_measured_is_not_measured_again(model, tmp_path):
    first = put_under(model, fast_device()[0], tmp_path)
    device, _ = fast_device()
    again = put_under(tiny_model(), replace(device, time_ms=None), tmp_path)  # would fail if it were called
    assert again.about == first.about


def test_what_a_start_has_no_time_for_the_next_one_measures(model, tmp_path):
    device, way = fast_device()
    ticks = iter(range(0, 10_000, 30))
    first = put_under(model, replace(device, clock=lambda: float(next(ticks))), tmp_path)
    assert isinstance(first.kernels, FusedKernels)
    num_left, measured = (choice_in(tmp_path)[name] for name in ("num_left", "measurements"))
    assert len(measured) == 3 and num_left > 10 and set(way.calls) == {"group_norm"}
    device, way = fast_device()
    again = put_under(tiny_model(), device, tmp_path)
    assert set(way.calls) == {*NAMES} and all(f"{name} fast " in again.about for name in NAMES)
    found = choice_in(tmp_path)
    assert found["num_left"] == 0 and found["measurements"][:3] == measured
    assert len(found["measurements"]) == 3 + num_left


def test_another_version_is_measured_again(model, tmp_path):
    put_under(model, fast_device()[0], tmp_path)
    device, _ = fast_device(wrong="layer_norm")
    newer = replace(device, about={**device.about, "torch": "2"})
    assert "not layer_norm" in put_under(tiny_model(), newer, tmp_path).about


def test_what_ended_the_process_is_not_tried_again(model, tmp_path):
    device, way = fast_device()

    def end(call: Callable[[], object]) -> float:
        call()
        if way.calls and way.calls[-1] == "attention":
            raise SystemExit  # as a process that is gone, it writes nothing more
        return 1.0

    with pytest.raises(SystemExit):
        put_under(model, replace(device, time_ms=end), tmp_path)
    installed = put_under(tiny_model(), fast_device()[0], tmp_path)
    assert "not attention: fast (a start that tried it ended without a result)" in installed.about
    assert not list(tmp_path.glob("*.trying"))


def test_a_damaged_file_is_measured_again(model, tmp_path):
    put_under(model, fast_device()[0], tmp_path)
    [file] = tmp_path.glob("*.json")
    file.write_text(file.read_text()[:-20])
    assert "attention fast" in put_under(tiny_model(), fast_device()[0], tmp_path).about
    assert choice_in(tmp_path)["device"] == "double"


def test_a_folder_that_cannot_be_written_costs_nothing_else(model, tmp_path):
    (tmp_path / "file").write_text("")
    assert "attention fast" in put_under(model, fast_device()[0], tmp_path / "file" / "folder").about


def test_on_a_cpu_the_models_own_modules_run(model):
    installed = native_kernels(model, max_slots=1)
    assert type(installed.kernels) is NativeKernels and installed.about == ""


def test_the_nearest_size_decides_and_most_shapes_for_one_that_was_not_measured():
    def measured(size: int, width: int, fastest: str) -> Measurement:
        return Measurement(operation="layer_norm", shape=(width,), size=size, ms={TORCH: 1.0, fastest: 0.5})

    choice = Choice(device="d", measurements=(measured(2, 8, "a"), measured(32, 8, "b"), measured(2, 4, "b")))
    clock = Clock()
    ways = {"a": Way(clock, 1), "b": Way(clock, 1)}
    operations = ChosenOperations(choice, ways)
    chosen = {
        (size, width): [name for name, way in ways.items() if operations._way("layer_norm", (width,), size) is way]
        for size, width in ((1, 8), (7, 8), (9, 8), (64, 8), (5, 999))
    }
    assert chosen == {(1, 8): ["a"], (7, 8): ["a"], (9, 8): ["b"], (64, 8): ["b"], (5, 999): ["b"]}
    assert type(operations._way("attention", (1, 2, 3, 4), 1)) is TorchOperations, "nothing was measured"


def test_a_file_about_something_else_is_not_read(tmp_path):
    file = ChoiceFile({"device": "a"}, tmp_path)
    file.write(Choice(device="a"))
    assert kept_choices(tmp_path) == [Choice(device="a")]
    assert file.read() == Choice(device="a") and ChoiceFile({"device": "b"}, tmp_path).read() is None

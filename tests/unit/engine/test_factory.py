"""Which engine is built, and the note that says why it is not another."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from fake_engine import FakeEngine
from machines import COMPLETE, MISSING

from mii_serve.config import DeployConfig
from mii_serve.engine import factory
from mii_serve.engine.engine_times import EngineTimes
from mii_serve.engine.kernels.comparison import Comparison
from mii_serve.engine.kernels.fused.install import Installed
from mii_serve.engine.machine import Machine
from mii_serve.errors import ConfigError, ModelError, UnusableEngineError
from mii_serve.models import LoadedModel


@pytest.fixture
def machine(monkeypatch):
    """Let the factory see another machine; models are not loaded, engines not built."""
    loaded = []

    def put(seen: Machine, *, deepspeed_fails: str = "", deepspeed_ms: float = 1.0, is_known: bool = False) -> list[str]:
        def load(config, device, dtype):
            loaded.append(dtype)
            return SimpleNamespace(pipeline=SimpleNamespace(unet=None))

        def compare(model, *, max_slots):
            if deepspeed_fails:
                raise UnusableEngineError(deepspeed_fails)
            times = EngineTimes(device="a", native_ms=(2.0, 8.0), deepspeed_ms=(deepspeed_ms, 4 * deepspeed_ms))
            return Comparison(times, None if is_known else Installed(SimpleNamespace(close=lambda: None), ""))

        def deepspeed(model, *, max_slots, group=None, installed=None, why=""):
            if deepspeed_fails:
                raise UnusableEngineError(deepspeed_fails)
            return FakeEngine()

        monkeypatch.setattr(factory, "inspect_machine", lambda: seen)
        monkeypatch.setattr(factory, "_load", load)
        monkeypatch.setattr(factory, "_device", lambda name: "cuda" if seen.gpus else "cpu")
        monkeypatch.setattr(factory, "why_unsupported", lambda unet: None)
        monkeypatch.setattr(
            factory,
            "native_engine",
            lambda model, *, max_slots, note, group, why: SimpleNamespace(name="native", note=note, why=why),
        )
        monkeypatch.setattr(factory, "compare_engines", compare)
        monkeypatch.setattr(factory, "deepspeed_engine", deepspeed)
        return loaded

    return put


def build(**settings):
    return factory.build_engine(DeployConfig.load({"model": "demo", **settings}))


@pytest.mark.parametrize("engine", ["auto", "deepspeed"])
def test_deepspeed_is_built_in_half_precision_where_it_can_run(machine, engine):
    loaded = machine(COMPLETE)
    assert isinstance(build(engine=engine), FakeEngine)
    assert loaded == ["fp16"]


@pytest.mark.parametrize(("is_known", "loaded"), [(False, ["fp16", "fp16"]), (True, ["fp16"])], ids=["measured now", "before"])
def test_auto_takes_native_where_a_call_with_deepspeeds_kernels_is_slower(machine, is_known, loaded):
    seen = machine(COMPLETE, deepspeed_ms=2.1, is_known=is_known)
    built = build(engine="auto")
    assert (built.name, built.note) == ("native", ""), "it is no fallback"
    assert built.why == "native by measurement: a UNet call takes 2.1, 8.4 ms with deepspeed, 2.0, 8.0 ms with native"
    assert seen == loaded, "an injected UNet is not used for native"


def test_ranks_do_not_measure_which_engine_is_faster(machine):
    machine(COMPLETE)
    built = factory._build(DeployConfig.load({"model": "demo", "tensor_parallel": 2}), SimpleNamespace(rank=0, size=2))
    assert (built.name, built.note) == ("native", "") and "by computed bounds" in built.why


@pytest.mark.parametrize(("seen", "what", "found", "remedy"), MISSING.values(), ids=list(MISSING))
def test_what_is_missing_refuses_deepspeed_before_loading_and_auto_takes_native(machine, caplog, seen, what, found, remedy):
    loaded = machine(seen)
    with pytest.raises(UnusableEngineError) as caught:
        build(engine="deepspeed")
    assert caught.value.setting == "engine"
    assert what in str(caught.value) and found in str(caught.value) and remedy in str(caught.value)
    assert loaded == []
    with caplog.at_level(logging.INFO, "mii_serve"):
        built = build(engine="auto")
    assert built.name == "native"
    assert built.note.startswith("not deepspeed: ") and what in built.note
    assert built.note in caplog.text


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"dtype": "fp32"}, "fp16 only, and the setting dtype is 'fp32'"),
        ({"dtype": "bf16"}, "fp16 only, and the setting dtype is 'bf16'"),
    ],
    ids=str,
)
def test_other_precisions_are_refused_by_name(machine, settings, named):
    machine(COMPLETE)
    with pytest.raises(UnusableEngineError, match=named):
        build(engine="deepspeed", **settings)
    assert named in build(engine="auto", **settings).note


def test_a_device_chosen_to_be_the_cpu_is_refused_by_name(machine):
    machine(MISSING["no gpu"][0])
    with pytest.raises(UnusableEngineError, match="on CUDA only, and the setting device is 'cpu'"):
        build(engine="deepspeed", device="cpu")


def test_kernels_that_prove_wrong_make_auto_load_the_model_again_for_native(machine):
    loaded = machine(COMPLETE, deepspeed_fails="DeepSpeed's kernels are 12.0% off")
    with pytest.raises(UnusableEngineError, match="off"):
        build(engine="deepspeed")
    loaded.clear()
    assert build(engine="auto").note == "not deepspeed: DeepSpeed's kernels are 12.0% off"
    assert loaded == ["fp16", "fp16"], "the UNet was changed in place"


def test_the_engine_native_has_no_note_about_deepspeed(machine):
    machine(COMPLETE)
    assert build(engine="native").note == ""


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"engine": "reference", "max_slots": 4}, "max_slots: the reference engine makes one picture at a time"),
        ({"engine": "native", "dtype": "fp16", "device": "cpu"}, "dtype: fp16 needs a GPU"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings, named):
    with pytest.raises(ConfigError, match=named):
        factory.build_engine(DeployConfig.load(settings))


def test_fp32_is_computed_in_fp32(monkeypatch):
    seen = []

    def load(*_, **settings):
        seen.append((settings["dtype"], torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        raise ModelError("enough seen")

    monkeypatch.setattr(factory, "load_model", load)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for engine in ("native", "reference"):
        torch.backends.cudnn.allow_tf32 = True
        with pytest.raises(ModelError):
            factory.build_engine(DeployConfig.load({"engine": engine, "dtype": "fp32", "device": "cpu"}))
    assert seen == [("fp32", False, False)] * 2


def test_the_description_has_the_first_of_the_operators_names(monkeypatch):
    model = LoadedModel(pipeline=None, name="folder", revision="1", defaults=None, limits=None)
    monkeypatch.setattr(factory, "load_model", lambda name, **settings: model)

    def model_name(**settings):
        return factory._load(DeployConfig.load(settings), "cpu", "fp32").name

    assert model_name(model="/home/op/folder", served_model_name=["org/sd", "dall-e-3"]) == "org/sd"
    assert model_name(model="/home/op/folder") == "folder"

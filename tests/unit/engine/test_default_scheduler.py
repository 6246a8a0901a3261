"""What a request gets that names no scheduler, and the error that an operator gets where there is none."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from samplers import schedulers

from mii_serve.engine.capabilities import capabilities_of
from mii_serve.errors import ModelError
from mii_serve.samplers.build import ModelSchedulers
from mii_serve.samplers.sampling import Samplings
from mii_serve.types import GenerationDefaults, Limits

PIPELINE = SimpleNamespace(
    text_encoder=SimpleNamespace(config=SimpleNamespace(num_hidden_layers=12, hidden_size=768)),
    tokenizer=SimpleNamespace(model_max_length=77),
    scheduler=SimpleNamespace(config={}),
    unet=SimpleNamespace(config=SimpleNamespace()),
)


def model(scheduler: str = "default") -> Any:
    return SimpleNamespace(name="m", limits=Limits(), defaults=GenerationDefaults(scheduler=scheduler, num_inference_steps=10))


def settled(model: Any, found: ModelSchedulers) -> GenerationDefaults:
    model.pipeline = PIPELINE
    return capabilities_of(model, found, Samplings(found).of).defaults


def test_the_models_own_scheduler_is_the_default():
    assert settled(model(), schedulers({}, "DPMSolverMultistepScheduler")).scheduler == "default"


def test_a_declared_scheduler_is_answered_with_its_short_name():
    assert settled(model("dpm++"), schedulers({})).scheduler == "dpm++_2m"
    assert settled(model("PNDMScheduler"), schedulers({})).scheduler == "default"


def test_a_declared_scheduler_that_is_none_speaks_to_the_operator():
    with pytest.raises(ModelError, match=r"m: its default scheduler.*mii_serve_defaults\.json"):
        settled(model("fastest"), schedulers({}))


def test_a_declared_scheduler_that_cannot_draw_is_named_and_not_the_models_own():
    config = {"algorithm_type": "sde-dpmsolver++"}
    with pytest.raises(ModelError, match="default scheduler 'DEISMultistepScheduler' cannot draw: NotImplementedError"):
        settled(model("DEISMultistepScheduler"), schedulers(config, "DPMSolverMultistepScheduler"))


def test_a_scheduler_that_the_pipeline_cannot_run_is_named_with_its_class_and_the_reason():
    found = schedulers({}, "FlowMatchEulerDiscreteScheduler")
    with pytest.raises(ModelError, match=r"FlowMatchEulerDiscreteScheduler, cannot draw: AttributeError: .*init_noise_sigma"):
        settled(model(), found)
    other = replace(model().defaults, scheduler="euler")
    assert settled(SimpleNamespace(name="m", limits=Limits(), defaults=other), found).scheduler == "euler"


def test_a_scheduler_without_steps_speaks_to_the_operator_too():
    with pytest.raises(ModelError, match=r"ScoreSdeVeScheduler, cannot draw: AttributeError: .*step"):
        settled(model(), schedulers({}, "ScoreSdeVeScheduler"))


def test_a_scheduler_that_reads_a_variance_beside_the_noise_is_refused_as_diffusers_refuses_it():
    found = schedulers({"variance_type": "learned_range"}, "DPMSolverMultistepScheduler")
    with pytest.raises(ModelError, match=r"DPMSolverMultistepScheduler, cannot draw: RuntimeError"):
        settled(model(), found)

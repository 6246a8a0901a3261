"""Which scheduler a name leads to, and which steps are refused."""

from __future__ import annotations

import importlib.util

import diffusers
import pytest
import torch
from samplers import SD_V1, SD_V1_CONFIG, schedulers

from mii_serve.errors import InvalidRequestError
from mii_serve.samplers.build import try_scheduler
from mii_serve.samplers.names import CLASS_NAMES, SAMPLERS
from mii_serve.samplers.run import SamplerRun


@pytest.mark.parametrize(
    ("name", "num_inference_steps"), [("pndm", 1000), ("ddim", 1000), ("dpm++_2m", 1000), ("lcm", 51), ("tcd", 51)]
)
def test_known_dead_ends_are_refused(name, num_inference_steps):
    with pytest.raises(InvalidRequestError):
        try_scheduler(SD_V1, SamplerRun(name, num_inference_steps))


@pytest.mark.parametrize("name", ["dpm_1s", "dpm_2s", "dpm_3s_karras"])
def test_what_fails_only_on_latents_of_more_than_one_cell_is_refused_before_it_joins_a_batch(name):
    thresholding = schedulers({**SD_V1_CONFIG, "thresholding": True})
    with pytest.raises(InvalidRequestError) as refused:
        try_scheduler(thresholding, SamplerRun(name, 6))
    assert "RuntimeError" in refused.value.rule, "diffusers' own scheduler multiplies the latents by all noise levels"


@pytest.mark.parametrize("name", ["pndm", "ddim", "euler"])
def test_the_most_steps_that_work_are_let_in(name):
    try_scheduler(SD_V1, SamplerRun(name, 1000 if name == "euler" else 999))


def test_every_name_leads_to_a_sampler_and_every_sampler_has_its_own_name():
    accepted = SD_V1.accepted_names
    assert set(accepted.values()) == {"default", *SAMPLERS, *CLASS_NAMES} - {"PNDMScheduler"}
    assert all(accepted[name] == name for name in SAMPLERS)
    assert accepted["DPMSolverMultistepScheduler"] == "DPMSolverMultistepScheduler"
    assert accepted["PNDMScheduler"] == "default", "the model's own class, with the model's own options"


def test_the_grammar_has_every_spacing_of_every_solver():
    assert set(SAMPLERS) >= {"heun_karras", "dpm++_3m_sde_exponential", "unipc_3_beta", "lms_exponential", "dpm++_2m_lu"}
    assert set(SAMPLERS) >= {"kdpm2_a_karras", "dpm++_1s_beta", "deis_2_flow", "sa_solver_karras", "dpm_2m", "dpm++_sde_karras"}


@pytest.mark.parametrize("name", ["ddim", "ddpm", "lcm", "tcd"])
def test_a_named_scheduler_is_repaired_as_the_pipeline_repairs_its_own(name):
    bare = {key: value for key, value in SD_V1_CONFIG.items() if key not in ("clip_sample", "steps_offset", "skip_prk_steps")}
    made = schedulers(bare, "EulerDiscreteScheduler").make(SamplerRun(name, 8), torch.device("cpu"))
    assert made.config.clip_sample is False
    assert made.config.get("steps_offset", 1) == 1


def test_pndm_on_a_modern_config_takes_no_runge_kutta_steps():
    made = schedulers({"beta_schedule": "scaled_linear"}, "EulerDiscreteScheduler").make(
        SamplerRun("pndm", 8), torch.device("cpu")
    )
    assert made.config.skip_prk_steps is True
    assert len(made.timesteps) == 9


def test_the_models_own_scheduler_keeps_every_option():
    config = {**SD_V1_CONFIG, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "solver_order": 3}
    found = schedulers(config, "DPMSolverMultistepScheduler")
    for name in ("default", found.accepted_names["DPMSolverMultistepScheduler"]):
        made = found.make(SamplerRun(name, 8), torch.device("cpu"))
        assert (made.config.algorithm_type, made.config.use_karras_sigmas, made.config.solver_order) == (
            "sde-dpmsolver++",
            True,
            3,
        )
    described = found.describe("default", is_compiled=True)
    assert described.class_name == "DPMSolverMultistepScheduler"
    assert described.options.items() >= {"use_karras_sigmas": "true", "solver_order": "3", "beta_end": "0.012"}.items()
    assert "prediction_type" not in described.options


def test_a_class_that_the_models_config_does_not_allow_is_the_callers_error_by_field():
    found = schedulers({**SD_V1_CONFIG, "algorithm_type": "sde-dpmsolver++"}, "DPMSolverMultistepScheduler")
    with pytest.raises(InvalidRequestError, match="sde-dpmsolver") as caught:
        found.make(SamplerRun("DEISMultistepScheduler", 8), torch.device("cpu"))
    assert caught.value.field == "scheduler"
    found.make(SamplerRun("deis", 8), torch.device("cpu"))


@pytest.mark.skipif(importlib.util.find_spec("torchsde") is not None, reason="torchsde is installed")
def test_a_missing_package_is_named():
    with pytest.raises(InvalidRequestError, match="needs the package torchsde") as caught:
        SD_V1.make(SamplerRun("dpm++_sde", 8), torch.device("cpu"))
    assert caught.value.field == "scheduler"


class DrawsElsewhere(diffusers.DDIMScheduler):
    """Takes noise that no seed of a request decides."""

    def step(self, *args, **kwargs):
        made = super().step(*args, **kwargs)
        return (made[0] + 0.1 * torch.randn(made[0].shape), *made[1:])


def test_a_scheduler_that_draws_from_another_source_is_refused():
    found = schedulers(SD_V1_CONFIG)
    found._built["default"] = DrawsElsewhere.from_config(SD_V1_CONFIG)
    with pytest.raises(InvalidRequestError, match="generator"):
        try_scheduler(found, SamplerRun("default", 5))

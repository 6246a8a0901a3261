"""A sampler that was let in makes all its steps; one that cannot is refused, by the number of steps."""

from __future__ import annotations

import pytest
import torch

from mii_serve.errors import InvalidRequestError, ModelError
from mii_serve.samplers.build import make_scheduler, step_kwargs, try_scheduler
from mii_serve.samplers.names import ACCEPTED_NAMES, SAMPLERS, short_name

SD_V1_CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}


def walk(name: str, num_inference_steps: int) -> torch.Tensor:
    scheduler = make_scheduler(SD_V1_CONFIG, name, num_inference_steps, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(1, 4, 2, 2, generator=generator) * scheduler.init_noise_sigma
    kwargs = step_kwargs(scheduler, generator)
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(sample, timestep)
        output = torch.randn(sample.shape, generator=generator)
        sample = scheduler.step(output, timestep, sample, **kwargs, return_dict=False)[0]
    return sample


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_what_passes_the_trial_ends_finite_and_the_rest_names_the_field(name):
    num_let_in = 0
    for num_inference_steps in (1, 2, 3, 4, 5, 10, 50, 999, 1000):
        try:
            try_scheduler(SD_V1_CONFIG, name, num_inference_steps)
        except InvalidRequestError as error:
            assert error.field == "num_inference_steps"
            assert name in error.rule
            assert num_inference_steps > 50, "the usual numbers work with every sampler"
        else:
            assert walk(name, num_inference_steps).isfinite().all()
            num_let_in += 1
    assert num_let_in >= 7


@pytest.mark.parametrize(
    ("name", "num_inference_steps"), [("pndm", 1000), ("ddim", 1000), ("dpm++_2m", 1000), ("lcm", 51), ("tcd", 51)]
)
def test_known_dead_ends_are_refused(name, num_inference_steps):
    with pytest.raises(InvalidRequestError):
        try_scheduler(SD_V1_CONFIG, name, num_inference_steps)


@pytest.mark.parametrize("name", ["pndm", "ddim", "euler"])
def test_the_most_steps_that_work_are_let_in(name):
    try_scheduler(SD_V1_CONFIG, name, 1000 if name == "euler" else 999)


def test_every_name_leads_to_a_sampler_and_every_sampler_has_its_own_name():
    assert set(ACCEPTED_NAMES.values()) == set(SAMPLERS)
    assert all(ACCEPTED_NAMES[name] == name for name in SAMPLERS)
    assert ACCEPTED_NAMES["PNDMScheduler"] == "pndm"
    assert ACCEPTED_NAMES["DPMSolverMultistepScheduler"] == "dpm++_2m"


def test_a_model_with_an_unknown_scheduler_is_refused_by_name():
    assert short_name("EulerDiscreteScheduler") == "euler"
    with pytest.raises(ModelError, match="MyScheduler"):
        short_name("MyScheduler")

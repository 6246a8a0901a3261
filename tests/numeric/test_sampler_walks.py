"""Every name sets what it says; a sampler that was let in makes all its steps, and one that cannot is refused."""

from __future__ import annotations

import inspect

import pytest
import torch
from samplers import ALL, SD_V1, SD_V1_CONFIG, USUAL, schedulers

from mii_serve.errors import InvalidRequestError
from mii_serve.samplers.build import step_kwargs, try_scheduler
from mii_serve.samplers.names import SAMPLERS
from mii_serve.samplers.run import SamplerRun

LARGE = {"lms": (200,)}
"""Where not the largest numbers of all: lms integrates a polynomial for each step."""


def walk(name: str, num_inference_steps: int) -> torch.Tensor:
    scheduler = SD_V1.make(SamplerRun(name, num_inference_steps), torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(1, 4, 2, 2, generator=generator) * scheduler.init_noise_sigma
    kwargs = step_kwargs(scheduler, generator)
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(sample, timestep)
        output = torch.randn(sample.shape, generator=generator)
        sample = scheduler.step(output, timestep, sample, **kwargs, return_dict=False)[0]
    return sample


@pytest.mark.slow
@pytest.mark.parametrize("name", USUAL)
def test_what_passes_the_trial_ends_finite_and_the_rest_names_the_field(name):
    for num_inference_steps in (1, 2, 3, 4, 5, 10, 50):
        try_scheduler(SD_V1, SamplerRun(name, num_inference_steps))  # the usual numbers work with every sampler
        assert walk(name, num_inference_steps).isfinite().all()
    for num_inference_steps in LARGE.get(name, (1000, 999)):
        try:
            try_scheduler(SD_V1, SamplerRun(name, num_inference_steps))
        except InvalidRequestError as error:
            assert error.field == "num_inference_steps"
            assert name in error.rule
        else:
            assert walk(name, num_inference_steps).isfinite().all()
            break  # the largest number of all: one less takes as long, and shows no more


@pytest.mark.parametrize("name", ALL)
def test_a_name_sets_what_it_says_and_leaves_the_rest_to_the_model(name):
    """Also on a config that says the opposite: diffusers allows one spacing at a time."""
    class_name, config = "EulerDiscreteScheduler", {**SD_V1_CONFIG, "use_exponential_sigmas": True, "beta_end": 0.013}
    made = schedulers(config, class_name).make(SamplerRun(name, 8), torch.device("cpu"))
    assert type(made).__name__ == SAMPLERS[name].class_name
    for option, value in SAMPLERS[name].overrides.items():
        assert made.config[option] == value
    assert made.config.get("beta_end", 0.013) == 0.013
    known = inspect.signature(type(made).__init__).parameters
    spacings = [option for option in known if option.startswith("use_") and made.config[option]]
    assert len(spacings) == (name.rsplit("_", 1)[-1] in {"karras", "exponential", "beta", "lu", "flow"}), spacings

"""What a compiled table says, and what cannot be compiled."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from samplers import CONFIG, compile_table, schedulers

from mii_serve.samplers import sampling
from mii_serve.samplers.run import SamplerRun
from mii_serve.samplers.sampling import Samplings, Uncompiled
from mii_serve.samplers.table import SamplerTable
from mii_serve.samplers.update import estimate_x0


@pytest.mark.parametrize(
    ("sampler", "num_steps", "num_calls"), [("pndm", 50, 51), ("pndm", 1, 1), ("heun", 10, 19), ("ddim", 10, 10)]
)
def test_calls_are_counted_as_the_scheduler_makes_them(sampler, num_steps, num_calls):
    assert compile_table(CONFIG, sampler, num_steps).num_calls == num_calls


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm++_2m"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_model_answer_gives_the_clean_latents(sampler, prediction_type):
    compiled = compile_table({**CONFIG, "prediction_type": prediction_type}, sampler, 10)
    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    alphas_cumprod = diffusers.DDIMScheduler.from_config(CONFIG).alphas_cumprod.double().numpy()
    for k in range(compiled.num_calls):
        at = float(np.interp(compiled.timesteps[k], np.arange(1000), alphas_cumprod))
        model_input = at**0.5 * clean + (1 - at) ** 0.5 * noise
        velocity = at**0.5 * noise - (1 - at) ** 0.5 * clean
        answer = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[prediction_type]
        estimate = estimate_x0(model_input, answer, torch.from_numpy(compiled.x0[k : k + 1]))
        assert torch.allclose(estimate, clean, atol=1e-4)


@pytest.mark.parametrize(
    ("class_name", "option"),
    [
        ("DPMSolverMultistepScheduler", "thresholding"),
        ("DDIMScheduler", "thresholding"),
        ("UniPCMultistepScheduler", "thresholding"),
    ],
)
def test_a_scheduler_that_is_not_linear_is_not_compiled_and_says_why(class_name, option):
    found = Samplings(schedulers({**CONFIG, option: True}, class_name)).of(SamplerRun("default", 10))
    assert isinstance(found, Uncompiled)
    assert option in found.reason
    assert found.num_calls == 10


class SquashingScheduler(diffusers.DDIMScheduler):
    """Not linear, and no option says so."""

    def step(self, model_output, *args, **kwargs):
        return super().step(torch.tanh(model_output), *args, **kwargs)


def test_what_no_option_tells_the_replay_finds(monkeypatch):
    monkeypatch.setattr(diffusers, "SquashingScheduler", SquashingScheduler, raising=False)
    found = Samplings(schedulers(CONFIG, "SquashingScheduler")).of(SamplerRun("default", 10))
    assert isinstance(found, Uncompiled)
    assert "not linear" in found.reason


@pytest.mark.parametrize(
    "class_name", ["SASolverScheduler", "IPNDMScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]
)
def test_what_a_scheduler_keeps_in_a_history_of_its_own_is_found_by_looking(class_name):
    assert isinstance(Samplings(schedulers(CONFIG, class_name)).of(SamplerRun("default", 12)), SamplerTable)


def test_a_table_is_compiled_once():
    found = Samplings(schedulers(CONFIG))
    assert found.of(SamplerRun("euler", 7)) is found.of(SamplerRun("euler", 7))


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(sampling, "MAX_CACHED", 3)
    found = Samplings(schedulers(CONFIG))
    for num_steps in range(1, 8):
        found.of(SamplerRun("ddim", num_steps))
    assert len(found._cache) == 3

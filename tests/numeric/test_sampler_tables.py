"""A compiled table makes the steps that the diffusers scheduler object makes, for every sampler, alone and in a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from samplers import ALL, CONFIG, CPU, USUAL, compile_table, kept_schedulers

from mii_serve.errors import InvalidRequestError
from mii_serve.samplers.build import step_kwargs, try_scheduler
from mii_serve.samplers.run import SamplerRun
from mii_serve.samplers.update import step

TOLERANCE = 5e-6
"""Relative, after float32 arithmetic in both; most are below 5e-7, dpm++_3m_sde_beta is the farthest off with 4e-6."""


STEP_COUNTS = (1, 2, 3, 4, 5, 10, 20, 50)


def num_calls_of(config: dict, sampler: str, num_steps: int) -> int | None:
    """As the trial counts them; None where the sampler cannot make so many steps."""
    try:
        return try_scheduler(kept_schedulers(config), SamplerRun(sampler, num_steps))
    except InvalidRequestError:
        return None


def outputs(num_calls: int, seed: int) -> torch.Tensor:
    return torch.randn(num_calls, 1, 4, 8, 6, generator=torch.Generator().manual_seed(seed + 1000))


def diffusers_trajectory(config: dict, sampler: str, num_steps: int, seed: int) -> list[torch.Tensor]:
    scheduler = kept_schedulers(config).make(SamplerRun(sampler, num_steps), CPU)
    generator = torch.Generator().manual_seed(seed)
    kwargs = step_kwargs(scheduler, generator)
    latents = torch.randn(1, 4, 8, 6, generator=generator) * scheduler.init_noise_sigma
    trajectory = [latents]
    for timestep, output in zip(scheduler.timesteps, outputs(len(scheduler.timesteps), seed), strict=True):
        scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(output, timestep, latents, **kwargs, return_dict=False)[0]
        trajectory.append(latents)
    return trajectory


class TableRun:
    """One sample stepped by its table, as an engine does it."""

    def __init__(self, config: dict, sampler: str, num_steps: int, seed: int) -> None:
        self.table = compile_table(config, sampler, num_steps)
        self.generator = torch.Generator().manual_seed(seed)
        self.outputs = outputs(self.table.num_calls, seed)
        self.state = torch.zeros(1, 5, 4, 8, 6)
        self.state[:, 0] = torch.randn(1, 4, 8, 6, generator=self.generator) * self.table.init_noise_sigma
        self.k = 0

    @property
    def is_over(self) -> bool:
        return self.k == self.table.num_calls

    def noise(self) -> torch.Tensor:
        shape = (1, 4, 8, 6)
        return torch.randn(shape, generator=self.generator) if self.table.draws_noise[self.k] else torch.zeros(shape)


def step_together(runs: list[TableRun]) -> None:
    matrices = torch.from_numpy(np.stack([run.table.matrices[run.k] for run in runs]))
    state = step(
        torch.cat([run.state for run in runs]),
        torch.cat([run.outputs[run.k] for run in runs]),
        torch.cat([run.noise() for run in runs]),
        matrices,
    )
    for index, run in enumerate(runs):
        run.state, run.k = state[index : index + 1], run.k + 1


def relative_difference(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found - true).norm() / true.norm())


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", USUAL)
def test_a_table_makes_the_steps_that_the_scheduler_makes(sampler, prediction_type):
    config = {**CONFIG, "prediction_type": prediction_type}
    counts = STEP_COUNTS if prediction_type == "epsilon" else (1, 4, 10)
    tried = 0
    for num_steps in counts:
        if (num_calls := num_calls_of(config, sampler, num_steps)) is None:
            continue
        run = TableRun(config, sampler, num_steps, seed=num_steps)
        truth = diffusers_trajectory(config, sampler, num_steps, seed=num_steps)
        assert run.table.num_calls == len(truth) - 1 == num_calls
        while not run.is_over:
            step_together([run])
            assert relative_difference(run.state[:, 0], truth[run.k]) < TOLERANCE, (num_steps, run.k)
        tried += 1
    if not tried:
        pytest.skip(f"diffusers has no {sampler} for {prediction_type}")


@pytest.mark.slow
def test_every_usual_sampler_works_with_v1_4s_own_settings():
    for sampler in USUAL:
        for num_steps in (4, 10, 20, 50):
            assert compile_table(CONFIG, sampler, num_steps).num_calls >= num_steps


COUNTS = {sampler: 4 + 3 * index % 17 for index, sampler in enumerate(ALL)}
"""Many numbers of steps, one for each sampler."""


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ALL)
def test_every_name_of_the_grammar_is_compiled(sampler):
    assert compile_table(CONFIG, sampler, COUNTS[sampler]).num_calls >= COUNTS[sampler]


@pytest.mark.slow
def test_all_samplers_step_in_one_batch_at_different_steps():
    runs = {sampler: TableRun(CONFIG, sampler, count, seed=count) for sampler, count in COUNTS.items()}
    late = dict(list(runs.items())[::2])
    for run in late.values():
        step_together([run])
    while going := [run for run in runs.values() if not run.is_over]:
        step_together(going)
    for sampler, run in runs.items():
        truth = diffusers_trajectory(CONFIG, sampler, COUNTS[sampler], COUNTS[sampler])
        assert relative_difference(run.state[:, 0], truth[-1]) < TOLERANCE, sampler


@pytest.mark.parametrize("sampler", ["euler", "lms", "heun", "ddim", "kdpm2"])
def test_the_unet_gets_the_scaled_latents_and_the_timestep_of_the_scheduler(sampler):
    compiled = compile_table(CONFIG, sampler, 10)
    scheduler = kept_schedulers(CONFIG).make(SamplerRun(sampler, 10), CPU)
    latents = torch.randn(1, 4, 8, 8) * 5
    for k, timestep in enumerate(scheduler.timesteps):
        assert compiled.timesteps[k] == float(timestep)
        expected = scheduler.scale_model_input(latents, timestep)
        assert torch.allclose(latents * float(compiled.input_scale[k]), expected, rtol=1e-6, atol=1e-6)
        scheduler.step(torch.randn_like(latents), timestep, latents)


def test_only_ancestral_samplers_draw_noise():
    drawing = {sampler for sampler in USUAL if any(compile_table(CONFIG, sampler, 10).draws_noise)}
    assert drawing >= {"ddpm", "euler_a", "kdpm2_a", "dpm++_2m_sde", "dpm++_2m_sde_karras", "lcm"}
    assert drawing.isdisjoint({"pndm", "ddim", "euler", "heun", "lms", "dpm++_2m", "unipc", "deis"})


@pytest.mark.parametrize(("sampler", "num_steps"), [("pndm", 1000), ("dpm++_2m", 1000), ("lcm", 51)])
def test_steps_that_a_sampler_cannot_make_are_refused(sampler, num_steps):
    with pytest.raises(InvalidRequestError) as caught:
        compile_table(CONFIG, sampler, num_steps)
    assert caught.value.field == "num_inference_steps"

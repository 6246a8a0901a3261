"""Builds the diffusers scheduler object a request names, from the model's own scheduler config, and tries it out first."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch

from mii_serve.errors import InvalidRequestError
from mii_serve.samplers.names import SAMPLERS

REFUSALS = (ArithmeticError, LookupError, RuntimeError, ValueError)
"""What diffusers' schedulers raise for a number of steps they cannot make."""


def make_scheduler(model_config: dict[str, Any], name: str, num_inference_steps: int, device: torch.device) -> Any:
    """A fresh scheduler with its timesteps set.

    `name` is a key of `SAMPLERS`. Settings the sampler does not override are the model's own.

    Raises:
        InvalidRequestError: the sampler cannot make that many steps.
    """
    spec = SAMPLERS[name]
    scheduler = getattr(diffusers, spec.class_name).from_config(model_config, **spec.overrides)
    try:
        scheduler.set_timesteps(num_inference_steps, device=device)
    except REFUSALS as error:
        raise refusal(name, num_inference_steps, str(error).splitlines()[0][:200]) from error
    if hasattr(scheduler, "set_begin_index"):
        # With so many steps that timesteps repeat, it would otherwise look its first one up, find the second, and run out.
        scheduler.set_begin_index(0)
    return scheduler


def step_kwargs(scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
    """What `StableDiffusionPipeline` hands to `step` of this scheduler beside the usual."""
    accepted = inspect.signature(scheduler.step).parameters
    offered = {"eta": 0.0, "generator": generator}
    return {name: value for name, value in offered.items() if name in accepted}


def try_scheduler(model_config: dict[str, Any], name: str, num_inference_steps: int) -> int:
    """Count the UNet calls by running through them on four numbers: some schedulers fail, or divide by zero, only on the way.

    PNDM with v1-4's `steps_offset` asks for a timestep beyond the last one when it makes 1000 steps; DPM-Solver++ gets the same
    timestep twice near there. Takes about 40 microseconds a step.

    Raises:
        InvalidRequestError: the sampler cannot make that many steps.
    """
    scheduler = make_scheduler(model_config, name, num_inference_steps, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    kwargs = step_kwargs(scheduler, generator)
    sample = torch.randn(1, 4, 1, 1, generator=generator) * scheduler.init_noise_sigma
    try:
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(sample, timestep)
            model_output = torch.randn(sample.shape, generator=generator)
            sample = scheduler.step(model_output, timestep, sample, **kwargs, return_dict=False)[0]
    except REFUSALS as error:
        raise refusal(name, num_inference_steps, f"{type(error).__name__} on the way") from error
    if not sample.isfinite().all():
        raise refusal(name, num_inference_steps, "its result would not be finite")
    return len(scheduler.timesteps)


def refusal(name: str, num_inference_steps: int, reason: str) -> InvalidRequestError:
    rule = f"must be a number of steps that the scheduler {name} can make with this model ({reason})"
    return InvalidRequestError("num_inference_steps", rule, str(num_inference_steps))

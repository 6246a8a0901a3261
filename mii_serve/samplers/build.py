"""Builds the diffusers scheduler object a request names, from the model's own scheduler config."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from mii_serve.errors import InvalidRequestError
from mii_serve.samplers.names import SAMPLERS


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
    except (ValueError, IndexError, RuntimeError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InvalidRequestError("num_inference_steps", f"the scheduler {name} refuses it: {reason}") from error
    return scheduler

"""What a preview shows: the clean latents that the model output of one call stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def x0_coefficients(scheduler: Any, input_scales: Sequence[float] | None = None, *, first: int = 0) -> npt.NDArray[np.float32]:
    """What `samplers.update.estimate_x0` needs for every UNet call from the scheduler's `first` on, N x 2.

    `input_scales` are what the latents are multiplied by on their way into the UNet, where that is known. The noise level is
    that of the scheduler's sigma where it has a formula for it, else that of the timestep, and variance-preserving, as the
    UNet was trained. Where a scheduler has neither, the estimate is the latents as they are.
    """
    timesteps = [float(timestep) for timestep in scheduler.timesteps[first:]]
    sigmas = scheduler.sigmas[first : first + len(timesteps)] if hasattr(scheduler, "sigmas") else ()
    kind = scheduler.config.get("prediction_type", "epsilon")
    if not hasattr(scheduler, "alphas_cumprod"):
        pairs = [(1 / scale, 0.0) for scale in input_scales or [1.0] * len(timesteps)]
    elif hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        levels = [scheduler._sigma_to_alpha_sigma_t(torch.as_tensor(sigma)) for sigma in sigmas]
        pairs = [clean_latents(kind, float(alpha), float(sigma)) for alpha, sigma in levels]
    elif hasattr(scheduler, "sigmas") and scheduler.config.get("timestep_type") == "continuous":
        norms = [float(sigma**2 + 1) ** -0.5 for sigma in sigmas]
        pairs = [clean_latents(kind, norm, float(sigma) * norm) for norm, sigma in zip(norms, sigmas, strict=True)]
    else:
        alphas_cumprod = scheduler.alphas_cumprod.double().cpu().numpy()
        at = np.interp(timesteps, np.arange(len(alphas_cumprod)), alphas_cumprod)
        pairs = [clean_latents(kind, a**0.5, (1 - a) ** 0.5) for a in at.tolist()]
    return np.array(pairs, dtype=np.float32)


def clean_latents(prediction_type: str, alpha: float, sigma: float) -> tuple[float, float]:
    """Clean latents = first x noisy latents + second x model output (Salimans and Ho 2022, appendix D)."""
    if prediction_type == "epsilon":
        return 1 / max(alpha, 1e-12), -sigma / max(alpha, 1e-12)
    if prediction_type == "flow_prediction":
        return 1.0, -sigma
    return (alpha, -sigma) if prediction_type == "v_prediction" else (0.0, 1.0)

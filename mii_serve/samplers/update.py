"""The step of all samplers at once: one small matrix product per sample. Plain tensor operations, fit for a CUDA graph."""

from __future__ import annotations

import torch


def step(state: torch.Tensor, model_output: torch.Tensor, noise: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """The state after one UNet call of each sample.

    `state` is N × 5 × 4 × H × W in float32, `model_output` and `noise` are N × 4 × H × W, `matrices` are rows of
    `SamplerTable.matrices`, N × 5 × 7. Products of zero need finite partners: new samples start from zeros.
    """
    fresh = torch.stack((model_output.float(), noise), dim=1)
    planes = torch.cat((state, fresh), dim=1).flatten(2)
    return torch.bmm(matrices, planes).view_as(state)


def estimate_x0(model_input: torch.Tensor, model_output: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """What the model thinks the clean latents are, N × 4 × H × W; `x0` are rows of `SamplerTable.x0`, N × 2."""
    first, second = x0[:, 0, None, None, None], x0[:, 1, None, None, None]
    return first * model_input.float() + second * model_output.float()

"""Classifier-free guidance of a batch whose samples have scales of their own."""

from __future__ import annotations

import torch


def guide(
    uncond: torch.Tensor, text: torch.Tensor, guidance_scale: torch.Tensor, guidance_rescale: torch.Tensor
) -> torch.Tensor:
    """The guided predictions, N × channels × height × width, of N unconditional and N conditional ones.

    `guidance_scale` and `guidance_rescale` have one number for each. Rescaling is that of `StableDiffusionPipeline`, section
    3.4 of https://arxiv.org/abs/2305.08891; where it is 0, it changes no bit.
    """
    scale, rescale = guidance_scale[:, None, None, None], guidance_rescale[:, None, None, None]
    guided = uncond + scale * (text - uncond)
    dims = (1, 2, 3)
    rescaled = guided * (text.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
    return torch.where(rescale > 0, rescale * rescaled + (1 - rescale) * guided, guided)

"""Compares the injected UNet's predictions with those before the injection, so that wrong kernels are found at start-up.

The inputs are such as these kernels have been seen to get wrong: a latent shape whose tokens fill no block of the flash kernel,
guided and unguided samples together, and a prompt whose last token weighs most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mii_serve.engine.kernels import KernelSet
from mii_serve.errors import UnusableEngineError
from mii_serve.types import LatentShape

MAX_ERROR = 0.02
"""Root mean square of the difference over that of the prediction. Half precision alone is an order of magnitude below it."""

LAST_TOKEN_WEIGHT = 8.0

NUM_ROWS = 3
"""Of each call: an unguided sample's and a guided one's."""


def predictions(kernels: KernelSet, unet: Any, num_tokens: int, latent_shapes: Sequence[LatentShape]) -> list[torch.Tensor]:
    """The predictions for the check's inputs, one of rows × channels × height × width in float32 for each latent shape."""
    config, device, dtype = unet.config, unet.device, unet.dtype
    generator = torch.Generator().manual_seed(0)
    sample_of_row = torch.tensor([0, 1, 1], device=device)
    found = []
    for latent_shape in latent_shapes:
        latents = torch.randn(2, config.in_channels, *latent_shape, generator=generator)
        embeds = torch.randn(NUM_ROWS, num_tokens, config.cross_attention_dim, generator=generator)
        embeds[:, -1] *= LAST_TOKEN_WEIGHT
        timesteps = kernels.embed_timesteps(torch.tensor([999.0, 340.0], device=device))
        prompts = kernels.project_prompts(embeds.to(device, dtype))
        model_input = latents.to(device, dtype, memory_format=torch.channels_last)
        found.append(kernels.predict_noise(model_input, timesteps, prompts, sample_of_row).float())
    return found


def compare(injected: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest error of the injected UNet's `predictions`; `expected` are those before the injection.

    Raises:
        UnusableEngineError: it is larger than half precision explains.
    """
    errors = [
        float((one - other).square().mean().sqrt() / other.square().mean().sqrt())
        for one, other in zip(injected, expected, strict=True)
    ]
    for error, (*_, height, width) in zip(errors, (one.shape for one in expected), strict=True):
        if not error <= MAX_ERROR:  # NaN included
            raise UnusableEngineError(
                f"DeepSpeed's kernels are {error:.1%} off for latents of {height} × {width}, more than {MAX_ERROR:.0%}"
            )
    return max(errors)

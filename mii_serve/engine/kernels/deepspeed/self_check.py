"""Compares the injected UNet's predictions with those before the injection, so that wrong kernels are found at start-up.

The inputs are such as these kernels have been seen to get wrong: a latent shape whose tokens fill no block of the flash kernel,
guided and unguided samples together, and a prompt whose last token weighs most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mii_serve.engine.kernels import KernelSet
from mii_serve.engine.kernels.native import NativeKernels
from mii_serve.errors import UnusableEngineError
from mii_serve.types import LatentShape

MAX_ERROR = 0.02
"""Root mean square of the difference over that of the prediction. Half precision alone is an order of magnitude below it."""

LAST_TOKEN_WEIGHT = 8.0

NUM_ROWS = 3
"""Of each call: an unguided sample's and a guided one's."""


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """The predictions of a UNet's own modules for one call of each latent shape."""

    unet: Any
    num_tokens: int
    latent_shapes: Sequence[LatentShape]
    expected: Sequence[torch.Tensor]

    @classmethod
    def before_injection(cls, unet: Any, *, num_tokens: int, latent_shapes: Sequence[LatentShape]) -> SelfCheck:
        return cls(unet, num_tokens, latent_shapes, _predictions(NativeKernels(unet), unet, num_tokens, latent_shapes))

    def compare(self, injected: KernelSet) -> float:
        """The largest error of the injected UNet's predictions.

        Raises:
            UnusableEngineError: it is larger than half precision explains.
        """
        worst = 0.0
        predictions = _predictions(injected, self.unet, self.num_tokens, self.latent_shapes)
        for (height, width), expected, prediction in zip(self.latent_shapes, self.expected, predictions, strict=True):
            error = float((prediction - expected).square().mean().sqrt() / expected.square().mean().sqrt())
            if not error <= MAX_ERROR:  # NaN included
                raise UnusableEngineError(
                    f"DeepSpeed's kernels are {error:.1%} off for latents of {height} × {width}, more than {MAX_ERROR:.0%}"
                )
            worst = max(worst, error)
        return worst


def _predictions(kernels: KernelSet, unet: Any, num_tokens: int, latent_shapes: Sequence[LatentShape]) -> list[torch.Tensor]:
    config, device, dtype = unet.config, unet.device, unet.dtype
    generator = torch.Generator().manual_seed(0)
    sample_of_row = torch.tensor([0, 1, 1], device=device)
    predictions = []
    for latent_shape in latent_shapes:
        latents = torch.randn(2, config.in_channels, *latent_shape, generator=generator)
        embeds = torch.randn(NUM_ROWS, num_tokens, config.cross_attention_dim, generator=generator)
        embeds[:, -1] *= LAST_TOKEN_WEIGHT
        timesteps = kernels.embed_timesteps(torch.tensor([999.0, 340.0], device=device))
        prompts = kernels.project_prompts(embeds.to(device, dtype))
        model_input = latents.to(device, dtype, memory_format=torch.channels_last)
        predictions.append(kernels.predict_noise(model_input, timesteps, prompts, sample_of_row).float())
    return predictions

"""Guidance and the step of every sampler in one kernel, and the UNet's input in another, in the place of some thirty.

The twin in torch is `TorchSampler`.
"""

from __future__ import annotations

import torch

from mii_serve.engine.kernels.fused import kernels, tiles
from mii_serve.engine.kernels.fused.triton_operations import Launch, run_on_device
from mii_serve.samplers.table import INPUT_PLANES, STATE_PLANES


class FusedSampler:
    """Implements `mii_serve.engine.kernels.sampler.SamplerKernels`; needs Triton."""

    def __init__(self, launch: Launch = run_on_device) -> None:
        self._launch = launch

    def begin(
        self, state: torch.Tensor, slots: torch.Tensor, input_scale: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SamplerKernels`."""
        num_samples, (channels, height, width) = len(slots), state.shape[2:]
        model_input = torch.empty(num_samples, channels, height, width, device=state.device)
        latents = torch.empty(model_input.shape, dtype=dtype, device=state.device, memory_format=torch.channels_last)
        self._launch(
            kernels.sampler_begin,
            (num_samples, -(-channels * height * width // tiles.SAMPLER["BLOCK"])),
            tiles.SAMPLER,
            [state, slots, input_scale, model_input, latents],
            [height * width],
            {"CHANNELS": channels, "PLANES": STATE_PLANES},
        )
        return model_input, latents

    def end(
        self,
        state: torch.Tensor,
        slots: torch.Tensor,
        noise_pred: torch.Tensor,
        uncond_row: torch.Tensor,
        guidance_scale: torch.Tensor,
        guidance_rescale: torch.Tensor,
        noise: torch.Tensor,
        matrices: torch.Tensor,
        *,
        is_guided: bool,
    ) -> torch.Tensor:
        """See `SamplerKernels`."""
        prediction = torch.empty_like(noise)
        num_samples, channels, height, width = noise.shape
        num_blocks = -(-channels * height * width // tiles.SAMPLER["BLOCK"])
        noise_pred = noise_pred.contiguous(memory_format=torch.channels_last)
        self._launch(
            kernels.sampler_end,
            (num_samples, num_blocks),
            tiles.SAMPLER,
            [noise_pred, uncond_row, guidance_scale, guidance_rescale, slots, state, noise, matrices, prediction],
            [height * width],
            {"CHANNELS": channels, "PLANES": STATE_PLANES, "INPUTS": INPUT_PLANES, "BLOCKS": num_blocks},
        )
        return prediction

"""What a turn does around the UNet call: its input from the samples' states, and their next states from its output."""

from __future__ import annotations

from typing import Protocol

import torch

from mii_serve.samplers.guidance import guide
from mii_serve.samplers.update import step


class SamplerKernels(Protocol):
    """`state` is slots × 5 × C × H × W in float32, `slots` the slots of N samples, int64. All is on the device."""

    def begin(
        self, state: torch.Tensor, slots: torch.Tensor, input_scale: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scaled latents, N × C × H × W in float32, and the same in `dtype` and channels last."""
        ...

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
        """Write the samples' next states, and return the predictions after guidance, N × C × H × W in float32.

        `noise_pred` is R × C × H × W, of which the first N are the samples' own; `uncond_row` is the row of each sample's
        unconditional prediction. Where no sample `is_guided`, it may be left unread.
        """
        ...


class TorchSampler:
    """Implements `SamplerKernels` on any device."""

    def begin(
        self, state: torch.Tensor, slots: torch.Tensor, input_scale: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        model_input = state[slots, 0] * input_scale[:, None, None, None]
        return model_input, model_input.to(dtype, memory_format=torch.channels_last)

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
        noise_pred = noise_pred.float()
        prediction = noise_pred[: len(slots)]
        if is_guided:
            prediction = guide(noise_pred[uncond_row], prediction, guidance_scale, guidance_rescale)
        state[slots] = step(state[slots], prediction, noise, matrices)
        return prediction

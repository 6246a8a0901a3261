"""The inputs of a batch as device tensors of a fixed shape, so that a captured CUDA graph can step any batch that fits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mii_serve.engine.batched.buckets import BatchShape
from mii_serve.samplers.table import INPUT_PLANES, STATE_PLANES
from mii_serve.types import LatentShape

MATRIX_SIZE = STATE_PLANES * INPUT_PLANES


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleInputs:
    """One sample's next step: indices of its state, timestep and prompts, and the numbers of its sampler's update.

    `slot` is an index into `SlotPool.state`, `timestep_row` into `TimestepCache.embeds`, `prompt_row` and `negative_prompt_row`
    into `PromptCache.projected`; an unguided sample has no negative prompt. `matrix` is 5 × 7, a row of
    `SamplerTable.matrices`. `noise` is channels × height × width in float32 on the CPU, None where the sampler draws none in
    this step.
    """

    slot: int
    timestep_row: int
    prompt_row: int
    negative_prompt_row: int | None
    guidance_scale: float
    guidance_rescale: float = 0.0
    input_scale: float
    matrix: npt.NDArray[np.float32]
    noise: torch.Tensor | None


def batch_shape(samples: Sequence[SampleInputs], latent_shape: LatentShape) -> BatchShape:
    num_guided = sum(sample.negative_prompt_row is not None for sample in samples)
    return BatchShape(len(samples), len(samples) + num_guided, *latent_shape)


class BatchInputs:
    """Indices and coefficients of N samples and R rows, refilled for every step; two copies to the device, three with noise.

    Row i < N is sample i with its prompt; the rows after those are the guided samples once more, with their negative prompts.
    `uncond_row` holds the row of each sample's unconditional prediction: for an unguided sample its only row, so that guidance
    leaves its prediction unchanged. Padding samples write to the padding slot, and their rows are not read.
    """

    def __init__(self, shape: BatchShape, num_channels: int, device: torch.device) -> None:
        self.shape = shape
        n, r = shape.num_samples, shape.num_rows
        self._ints = torch.zeros(3 * n + 2 * r, dtype=torch.int64, device=device)
        self._floats = torch.zeros((3 + MATRIX_SIZE) * n, device=device)
        self.slots, self.timestep_rows, self.uncond_row, self.prompt_rows, self.sample_of_row = self._ints.split(
            [n, n, n, r, r]
        )
        self.input_scale, self.guidance_scale, self.guidance_rescale, matrices = self._floats.split([n, n, n, MATRIX_SIZE * n])
        self.matrices = matrices.view(n, STATE_PLANES, INPUT_PLANES)
        self.noise = torch.zeros(n, num_channels, shape.height, shape.width, device=device)

    def fill(self, samples: Sequence[SampleInputs], padding_slot: int) -> None:
        """Take in samples whose `batch_shape` this shape holds.

        Old noise is left where it is: the matrix of a sample that draws none multiplies it by zero.
        """
        n, r = self.shape.num_samples, self.shape.num_rows
        ints, floats = np.zeros(3 * n + 2 * r, np.int64), np.zeros((3 + MATRIX_SIZE) * n, np.float32)
        slots, timestep_rows, uncond_row, prompt_rows, sample_of_row = np.split(ints, np.cumsum([n, n, n, r]))
        input_scale, guidance_scale, guidance_rescale, matrices = np.split(floats, [n, 2 * n, 3 * n])
        slots[:], uncond_row[:], sample_of_row[:] = padding_slot, np.arange(n), np.arange(r) % n
        next_row = n
        for i, sample in enumerate(samples):
            slots[i], timestep_rows[i], prompt_rows[i] = sample.slot, sample.timestep_row, sample.prompt_row
            input_scale[i] = sample.input_scale
            guidance_scale[i], guidance_rescale[i] = sample.guidance_scale, sample.guidance_rescale
            matrices[i * MATRIX_SIZE : (i + 1) * MATRIX_SIZE] = sample.matrix.ravel()
            if sample.negative_prompt_row is not None:
                uncond_row[i], prompt_rows[next_row], sample_of_row[next_row] = next_row, sample.negative_prompt_row, i
                next_row += 1
        self._copy(torch.from_numpy(ints), self._ints)
        self._copy(torch.from_numpy(floats), self._floats)
        noises = [(i, sample.noise) for i, sample in enumerate(samples) if sample.noise is not None]
        if noises:
            on_host = torch.zeros(self.noise.shape)
            for i, noise in noises:
                on_host[i] = noise
            self._copy(on_host, self.noise)

    def _copy(self, host: torch.Tensor, device: torch.Tensor) -> None:
        device.copy_(host.pin_memory() if device.is_cuda else host, non_blocking=True)

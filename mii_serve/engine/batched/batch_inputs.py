"""The inputs of a batch as device tensors of a fixed shape, so that a captured CUDA graph can step any batch that fits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mii_serve.engine.batched.buckets import BatchShape
from mii_serve.engine.batched.loras import LoraEntry
from mii_serve.engine.upload import upload
from mii_serve.samplers.table import INPUT_PLANES, STATE_PLANES
from mii_serve.types import LatentShape

MATRIX_SIZE = STATE_PLANES * INPUT_PLANES


@dataclass(slots=True, kw_only=True, eq=False)
class SampleInputs:
    """One sample's next step: indices of its state, timestep and prompts, and the numbers of its sampler's update.

    `slot` is an index into `SlotPool.state`, `timestep_row` into `TimestepCache.embeds`, `prompt_row` and `negative_prompt_row`
    into `PromptCache.projected`; an unguided sample has no negative prompt. Prompts of several chunks are in no row: they are
    `prompt_chunks`, the prompt and the negative one, (chunks × tokens) × `KernelSet.prompt_width`. `loras` is its entry of
    `BatchedLoras`. `matrix` is 5 × 7, a row of `SamplerTable.matrices`. `noise` is channels × height × width in float32 on the
    CPU, None where the sampler draws none in this step. Not frozen: one is made for each sample and turn, and a frozen one
    takes three times as long.
    """

    slot: int
    timestep_row: int
    prompt_row: int
    negative_prompt_row: int | None
    prompt_chunks: Sequence[torch.Tensor] | None = None
    guidance_scale: float
    guidance_rescale: float = 0.0
    input_scale: float
    matrix: npt.NDArray[np.float32]
    noise: torch.Tensor | None
    loras: LoraEntry | None = None

    @property
    def num_text_tokens(self) -> int:
        """Of a prompt of several chunks; 0 for any in a row."""
        return 0 if self.prompt_chunks is None else len(self.prompt_chunks[0])


def batch_shape(samples: Sequence[SampleInputs], latent_shape: LatentShape) -> BatchShape:
    num_guided = sum([sample.negative_prompt_row is not None for sample in samples])
    return BatchShape(len(samples), len(samples) + num_guided, *latent_shape)


class BatchInputs:
    """Indices and coefficients of N samples and R rows, refilled for every step; one copy to the device, two with noise.

    Row i is sample i with its prompt; the rows after those of the samples are the guided ones once more, with their negative
    prompts. `uncond_row` holds the row of each sample's unconditional prediction: for an unguided sample its only row, so that
    guidance leaves its prediction unchanged. Padding samples write to the padding slot, and their rows are not read.
    """

    def __init__(self, shape: BatchShape, num_channels: int, device: torch.device, *, has_fixed_rows: bool) -> None:
        """With fixed rows, the second row of guided sample i is row N + i also where fewer than N samples come."""
        self.shape = shape
        self.has_fixed_rows = has_fixed_rows
        n, r = shape.num_samples, shape.num_rows
        self._host = _HostInputs(n, r)
        self._memory = torch.from_numpy(self._host.memory)
        if device.type != "cpu":
            self._memory = torch.zeros_like(self._memory, device=device)
        ints, floats = self._memory[: 8 * self._host.num_ints], self._memory[8 * self._host.num_ints :]
        self.slots, self.timestep_rows, self.uncond_row, self.prompt_rows, self.sample_of_row = ints.view(torch.int64).split(
            [n, n, n, r, r]
        )
        self.input_scale, self.guidance_scale, self.guidance_rescale, matrices = floats.view(torch.float32).split(
            [n, n, n, MATRIX_SIZE * n]
        )
        self.matrices = matrices.view(n, STATE_PLANES, INPUT_PLANES)
        self.noise = torch.zeros(n, num_channels, shape.height, shape.width, device=device)

    @property
    def may_be_guided(self) -> bool:
        """Whether a batch with guided samples fits."""
        return self.shape.num_rows > (self.shape.num_samples if self.has_fixed_rows else 1)

    def fill(self, samples: Sequence[SampleInputs], padding_slot: int) -> None:
        """Take in samples whose `batch_shape` this shape holds.

        Old noise is left where it is: the matrix of a sample that draws none multiplies it by zero.
        """
        host, n = self._host, len(samples)
        negatives = [(i, row) for i, sample in enumerate(samples) if (row := sample.negative_prompt_row) is not None]
        guided = [i for i, _ in negatives]
        first = self.shape.num_samples if self.has_fixed_rows else n
        second = slice(first, first + len(guided))
        host.memory[:] = 0
        host.slots[:n], host.slots[n:] = [sample.slot for sample in samples], padding_slot
        host.timestep_rows[:n] = [sample.timestep_row for sample in samples]
        host.prompt_rows[:n], host.sample_of_row[:n] = [sample.prompt_row for sample in samples], host.own_rows[:n]
        host.prompt_rows[second] = [row for _, row in negatives]
        host.sample_of_row[second] = guided
        host.uncond_row[:] = host.own_rows
        host.uncond_row[guided] = np.arange(second.start, second.stop)
        host.input_scale[:n] = [sample.input_scale for sample in samples]
        host.guidance_scale[:n] = [sample.guidance_scale for sample in samples]
        host.guidance_rescale[:n] = [sample.guidance_rescale for sample in samples]
        for matrix, sample in zip(host.matrices, samples, strict=False):
            matrix[:] = sample.matrix
        if self._memory.device.type != "cpu":
            self._memory.copy_(torch.from_numpy(host.memory).pin_memory(), non_blocking=True)
        noises = [(i, sample.noise) for i, sample in enumerate(samples) if sample.noise is not None]
        if noises:
            on_host = torch.zeros(self.noise.shape)
            for i, noise in noises:
                on_host[i] = noise
            self.noise.copy_(upload(on_host, self.noise.device))


class _HostInputs:
    """The inputs on the host, as arrays over one piece of memory. On a CPU the tensors are the same memory."""

    def __init__(self, n: int, r: int) -> None:
        self.num_ints = 3 * n + 2 * r
        self.memory = np.zeros(8 * self.num_ints + 4 * (3 + MATRIX_SIZE) * n, np.uint8)
        ints, floats = self.memory[: 8 * self.num_ints].view(np.int64), self.memory[8 * self.num_ints :].view(np.float32)
        self.slots, self.timestep_rows, self.uncond_row, self.prompt_rows, self.sample_of_row = np.split(
            ints, np.cumsum([n, n, n, r])
        )
        self.input_scale, self.guidance_scale, self.guidance_rescale, matrices = np.split(floats, [n, 2 * n, 3 * n])
        self.matrices = matrices.reshape(n, STATE_PLANES, INPUT_PLANES)
        self.own_rows = np.arange(n)

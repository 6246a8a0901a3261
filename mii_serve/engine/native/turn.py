"""A turn as tensors of a fixed size on the device, so that a captured graph can make any turn that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mii_serve.engine.native.lattice import TurnSize
from mii_serve.samplers.table import INPUT_PLANES, STATE_PLANES

MATRIX_SIZE = STATE_PLANES * INPUT_PLANES


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Move:
    """One sample's part in a turn: where its state, its time and its prompts are, and the numbers of its sampler's step.

    `noise` is channels × height × width where the sampler draws some. An unguided sample has no `negative_prompt`.
    """

    slot: int
    time: int
    prompt: int
    negative_prompt: int | None
    guidance_scale: float
    input_scale: float
    matrix: npt.NDArray[np.float32]
    noise: torch.Tensor | None


def size_of(moves: Sequence[Move], height: int, width: int) -> TurnSize:
    num_guided = sum(move.negative_prompt is not None for move in moves)
    return TurnSize(len(moves), len(moves) + num_guided, height, width)


class Turn:
    """Indices and coefficients of N samples and R rows, refilled for every turn; two copies to the device, three with noise.

    Row i < N is sample i with its prompt; the rows after those are the guided samples once more, with their negative prompts.
    `uncond_row` is where a sample's prediction without its prompt is found: for an unguided sample that is its only row, which
    makes guidance leave its prediction as it is. Padding writes to the padding slot, and nobody reads its rows.
    """

    def __init__(self, size: TurnSize, num_channels: int, device: torch.device) -> None:
        self.size = size
        n, r = size.num_samples, size.num_rows
        self._ints = torch.zeros(3 * n + 2 * r, dtype=torch.int64, device=device)
        self._floats = torch.zeros((2 + MATRIX_SIZE) * n, device=device)
        self.slots, self.times, self.uncond_row, self.prompts, self.sample_of_row = self._ints.split([n, n, n, r, r])
        self.input_scale, self.guidance_scale, matrices = self._floats.split([n, n, MATRIX_SIZE * n])
        self.matrices = matrices.view(n, STATE_PLANES, INPUT_PLANES)
        self.noise = torch.zeros(n, num_channels, size.height, size.width, device=device)

    def fill(self, moves: Sequence[Move], padding_slot: int) -> None:
        """Any moves whose `size_of` this turn's size holds. Stale noise is left: no matrix takes it up unless it was drawn."""
        n, r = self.size.num_samples, self.size.num_rows
        ints, floats = np.zeros(3 * n + 2 * r, np.int64), np.zeros((2 + MATRIX_SIZE) * n, np.float32)
        slots, times, uncond_row, prompts, sample_of_row = np.split(ints, np.cumsum([n, n, n, r]))
        input_scale, guidance_scale, matrices = np.split(floats, [n, 2 * n])
        slots[:], uncond_row[:], sample_of_row[:] = padding_slot, np.arange(n), np.arange(r) % n
        next_row = n
        for i, move in enumerate(moves):
            slots[i], times[i], prompts[i] = move.slot, move.time, move.prompt
            input_scale[i], guidance_scale[i] = move.input_scale, move.guidance_scale
            matrices[i * MATRIX_SIZE : (i + 1) * MATRIX_SIZE] = move.matrix.ravel()
            if move.negative_prompt is not None:
                uncond_row[i], prompts[next_row], sample_of_row[next_row] = next_row, move.negative_prompt, i
                next_row += 1
        self._send(torch.from_numpy(ints), self._ints)
        self._send(torch.from_numpy(floats), self._floats)
        drawn = [(i, move.noise) for i, move in enumerate(moves) if move.noise is not None]
        if drawn:
            noise = torch.zeros(self.noise.shape)
            for i, draw in drawn:
                noise[i] = draw
            self._send(noise, self.noise)

    def _send(self, host: torch.Tensor, device: torch.Tensor) -> None:
        device.copy_(host.pin_memory() if device.is_cuda else host, non_blocking=True)

"""What the UNet's residual blocks add at each timestep, computed once per timestep and kept for all samples."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from mii_serve.engine.kernels import KernelSet
from mii_serve.engine.upload import upload

NUM_TIMESTEPS = 1024
"""40 MB for v1-4 in half precision. The usual samplers ask for whole timesteps, of which there are a thousand."""


class TimestepCache:
    """`embeds` is `num_timesteps` × `KernelSet.timestep_width`; a new timestep replaces the least recently used one."""

    def __init__(
        self, kernels: KernelSet, *, dtype: torch.dtype, device: torch.device, num_timesteps: int = NUM_TIMESTEPS
    ) -> None:
        self._kernels = kernels
        self._row_of: OrderedDict[float, int] = OrderedDict()
        self._num_timesteps = num_timesteps
        self.embeds = torch.zeros(num_timesteps, kernels.timestep_width, dtype=dtype, device=device)

    def rows(self, timesteps: Sequence[float]) -> list[int]:
        """The rows of `embeds` that hold these timesteps, at most `num_timesteps` different ones."""
        for timestep in timesteps:
            if timestep in self._row_of:
                self._row_of.move_to_end(timestep)
        for timestep in timesteps:
            if timestep not in self._row_of:
                self._add(timestep)
        return [self._row_of[timestep] for timestep in timesteps]

    def _add(self, timestep: float) -> None:
        """One at a time: several may round differently, and an image must not depend on the other samples in the batch."""
        is_full = len(self._row_of) == self._num_timesteps
        row = self._row_of.popitem(last=False)[1] if is_full else len(self._row_of)
        on_device = upload(torch.tensor([timestep], dtype=torch.float32), self.embeds.device)
        self.embeds[row] = self._kernels.embed_timesteps(on_device)[0]
        self._row_of[timestep] = row

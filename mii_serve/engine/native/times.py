"""What the residual blocks add at each time of the denoising, made once for every time anybody has been at."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from mii_serve.engine.native.unet import RowUNet

NUM_TIMES = 1024
"""40 MB for v1-4 in half precision. The common samplers ask for whole timesteps, of which there are a thousand."""


class TimeTable:
    """`projections` is `NUM_TIMES` × `RowUNet.time_width`; the least recently used times make room for new ones."""

    def __init__(self, unet: RowUNet, *, dtype: torch.dtype, device: torch.device, num_times: int = NUM_TIMES) -> None:
        self._unet = unet
        self._row_of: OrderedDict[float, int] = OrderedDict()
        self._num_times = num_times
        self.projections = torch.zeros(num_times, unet.time_width, dtype=dtype, device=device)

    def rows(self, timesteps: Sequence[float]) -> list[int]:
        """Where in `projections` these times are, at most `num_times` different ones."""
        for timestep in timesteps:
            if timestep in self._row_of:
                self._row_of.move_to_end(timestep)
        for timestep in timesteps:
            if timestep not in self._row_of:
                self._add(timestep)
        return [self._row_of[timestep] for timestep in timesteps]

    def _add(self, timestep: float) -> None:
        """One at a time: in a batch it might round differently, and nobody's picture may depend on who came first."""
        is_full = len(self._row_of) == self._num_times
        row = self._row_of.popitem(last=False)[1] if is_full else len(self._row_of)
        at = torch.tensor([timestep], dtype=torch.float32, device=self.projections.device)
        self.projections[row] = self._unet.embed_times(at)[0]
        self._row_of[timestep] = row

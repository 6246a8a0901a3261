"""What the UNet's residual blocks add at each timestep, computed once per timestep and kept for all samples.

In a latent consistency model it depends on the guidance scale, too, and with some LoRAs on those.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Sequence

import torch

from mii_serve.engine.batched.loras import BatchedLoras
from mii_serve.engine.kernels import KernelSet
from mii_serve.engine.upload import upload
from mii_serve.types import LoraParts

NUM_TIMESTEPS = 1024
"""40 MB for v1-4 in half precision. The usual samplers ask for whole timesteps, of which there are a thousand."""

Key = tuple[float, float | None, LoraParts]
"""A timestep, the guidance scale where the UNet takes it in, and the LoRAs where they change what is added."""


class TimestepCache:
    """`embeds` is `num_timesteps` × `KernelSet.timestep_width`; a new timestep replaces the least recently used one."""

    def __init__(
        self,
        kernels: KernelSet,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_timesteps: int = NUM_TIMESTEPS,
        loras: BatchedLoras | None = None,
    ) -> None:
        self._kernels = kernels
        self._loras = loras
        self._row_of: OrderedDict[Key, int] = OrderedDict()
        self._num_timesteps = num_timesteps
        self.embeds = torch.zeros(num_timesteps, kernels.timestep_width, dtype=dtype, device=device)

    def rows(
        self,
        timesteps: Sequence[float],
        guidance_scales: Sequence[float | None] | None = None,
        loras: Sequence[LoraParts] | None = None,
    ) -> list[int]:
        """The rows of `embeds` that hold these timesteps, at most `num_timesteps` different ones."""
        keys = list(zip(timesteps, guidance_scales or [None] * len(timesteps), loras or [()] * len(timesteps), strict=True))
        for key in keys:
            if key in self._row_of:
                self._row_of.move_to_end(key)
        for key in keys:
            if key not in self._row_of:
                self._add(key)
        return [self._row_of[key] for key in keys]

    def _add(self, key: Key) -> None:
        """One at a time: several may round differently, and an image must not depend on the other samples in the batch."""
        is_full = len(self._row_of) == self._num_timesteps
        row = self._row_of.popitem(last=False)[1] if is_full else len(self._row_of)
        timestep, guidance_scale, loras = key
        guidance = None if guidance_scale is None else self._uploaded(guidance_scale - 1)
        with contextlib.nullcontext() if self._loras is None else self._loras.timing(loras):
            self.embeds[row] = self._kernels.embed_timesteps(self._uploaded(timestep), guidance)[0]
        self._row_of[key] = row

    def _uploaded(self, value: float) -> torch.Tensor:
        return upload(torch.tensor([value], dtype=torch.float32), self.embeds.device)

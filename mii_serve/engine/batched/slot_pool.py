"""The sampler state of all samples of one latent shape, stacked on the device in float32."""

from __future__ import annotations

import torch

from mii_serve.samplers.table import STATE_PLANES


class SlotPool:
    """`state` is (slots + 1) × 5 × channels × height × width. A sample holds one slot; the last slot takes padding's writes."""

    def __init__(self, num_slots: int, latent_size: tuple[int, int, int], device: torch.device) -> None:
        """`latent_size` is channels, height and width."""
        self.state = torch.zeros(num_slots + 1, STATE_PLANES, *latent_size, device=device)
        self.padding_slot = num_slots
        self._free = list(reversed(range(num_slots)))

    @property
    def is_empty(self) -> bool:
        return len(self._free) == self.padding_slot

    def acquire(self, latents: torch.Tensor) -> int:
        """The slot of a new sample that starts from these latents, channels × height × width."""
        slot = self._free.pop()
        self.state[slot].zero_()  # the sampler's matrices multiply all planes, and 0 × NaN is NaN
        self.state[slot, 0] = latents
        return slot

    def release(self, slot: int) -> None:
        self._free.append(slot)

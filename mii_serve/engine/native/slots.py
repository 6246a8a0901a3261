"""Sampler state of all samples of one latent shape, stacked on the device in float32."""

from __future__ import annotations

import torch

from mii_serve.samplers.table import STATE_PLANES


class SlotBank:
    """`state` is (slots + 1) × 5 × channels × height × width. A sample holds one slot; the last is for padding to write to."""

    def __init__(self, num_slots: int, latent_size: tuple[int, int, int], device: torch.device) -> None:
        self.state = torch.zeros(num_slots + 1, STATE_PLANES, *latent_size, device=device)
        self.padding_slot = num_slots
        self._free = list(reversed(range(num_slots)))

    @property
    def is_empty(self) -> bool:
        return len(self._free) == self.padding_slot

    def take(self, latents: torch.Tensor) -> int:
        """Give a new sample's first latents a slot."""
        slot = self._free.pop()
        self.state[slot].zero_()  # what the matrices multiply by zero has to be finite
        self.state[slot, 0] = latents
        return slot

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

"""Sampler state of all samples of one latent shape, stacked on the device in float32."""

from __future__ import annotations

import torch

from mii_serve.samplers.table import STATE_PLANES


class SlotBank:
    """`state` is slots × 5 × channels × height × width; a sample holds one slot and a freed one starts from zeros again."""

    def __init__(self, num_slots: int, latent_size: tuple[int, int, int], device: torch.device) -> None:
        self.state = torch.zeros(num_slots, STATE_PLANES, *latent_size, device=device)
        self._free = list(reversed(range(num_slots)))
        self._num_slots = num_slots

    @property
    def is_empty(self) -> bool:
        return len(self._free) == self._num_slots

    def take(self, latents: torch.Tensor) -> int:
        """Give a new sample's first latents a slot."""
        slot = self._free.pop()
        self.state[slot].zero_()  # what the matrices multiply by zero has to be finite
        self.state[slot, 0] = latents
        return slot

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

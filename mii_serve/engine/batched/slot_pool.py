"""The sampler state of all samples of one latent shape, stacked on the device in float32."""

from __future__ import annotations

import torch

from mii_serve.samplers.table import STATE_PLANES


class SlotPool:
    """`state` is (slots + 1) × 5 × channels × height × width. A sample holds one slot; the last slot takes padding's writes.

    `condition` is what an inpainting model's UNet takes in beside the latents, (slots + 1) × channels × height × width; other
    models have none.
    """

    def __init__(
        self,
        num_slots: int,
        latent_size: tuple[int, int, int],
        device: torch.device,
        *,
        num_condition_channels: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`latent_size` is channels, height and width; `dtype` is that of the condition."""
        self.state = torch.zeros(num_slots + 1, STATE_PLANES, *latent_size, device=device)
        self.condition: torch.Tensor | None = None
        if num_condition_channels:
            self.condition = torch.zeros(
                num_slots + 1, num_condition_channels, *latent_size[1:], dtype=dtype, device=device
            ).to(memory_format=torch.channels_last)
        self.padding_slot = num_slots
        self._free = list(reversed(range(num_slots)))

    @property
    def is_empty(self) -> bool:
        return len(self._free) == self.padding_slot

    def acquire(self, latents: torch.Tensor, condition: torch.Tensor | None = None) -> int:
        """The slot of a new sample that starts from these latents, channels × height × width."""
        slot = self._free.pop()
        self.state[slot].zero_()  # the sampler's matrices multiply all planes, and 0 × NaN is NaN
        self.state[slot, 0] = latents
        if self.condition is not None and condition is not None:
            self.condition[slot] = condition
        return slot

    def release(self, slot: int) -> None:
        self._free.append(slot)

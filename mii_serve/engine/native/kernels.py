"""What may differ between the batched engines: how the UNet of a turn is computed. The loop around it is the same."""

from __future__ import annotations

from dataclasses import dataclass

from mii_serve.engine.native.unet import RowUNet


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSet:
    """`name` is the engine's in every answer.

    `max_cells_per_call` bounds a UNet call (rows × latent height × latent width) where the kernels work in memory set aside
    beforehand; a call for one sample must always fit.
    """

    name: str
    unet: RowUNet
    max_cells_per_call: int | None = None

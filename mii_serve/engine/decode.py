"""Decodes latents into images. An image that is not finite is reported as a fault and never becomes a picture.

The VAE of many models overflows in fp16 on some latents; users of diffusers then see a black picture. Such an image is
decoded again in fp32, by itself, unless the VAE's config says `force_upcast: false`, with which a model declares that its VAE
needs no fp32; diffusers reads the key the same way in its SDXL pipelines, where it decodes in fp32 from the start. What was not
finite before it was decoded, or is not afterwards, is a fault of that sample alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

Fault = Literal["latents", "image"]
"""What is not finite."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """`images` is N × 3 × H × W in [-1, 1]; each has its entry in `faults`, None where it is a picture."""

    images: torch.Tensor
    faults: Sequence[Fault | None]

    @property
    def good(self) -> list[int]:
        """The indices of the pictures."""
        return [index for index, fault in enumerate(self.faults) if fault is None]

    @property
    def good_images(self) -> torch.Tensor:
        return self.images if len(self.good) == len(self.faults) else self.images[self.good]


def decode(vae: Any, latents: torch.Tensor, generator: torch.Generator | None = None) -> Decoded:
    """Decode latents, N × channels × H/8 × W/8, as `StableDiffusionPipeline.__call__` does.

    All that is fetched from the device is whether the values are finite.
    """
    scaled = latents / vae.config.scaling_factor
    images = vae.decode(scaled.to(vae.dtype), return_dict=False, generator=generator)[0]
    are_finite: list[list[bool]] = torch.stack((_are_finite(latents), _are_finite(images)), dim=1).tolist()
    faults = [_fault(*each) for each in are_finite]
    overflowed = [index for index, fault in enumerate(faults) if fault == "image"]
    if overflowed and decodes_in_fp32(vae):
        again = _decode_in_fp32(vae, scaled[overflowed], generator)
        images = images.clone()
        images[overflowed] = again.clamp(*_range(images.dtype)).to(images.dtype)
        for index, is_finite in zip(overflowed, _are_finite(again).tolist(), strict=True):
            faults[index] = _fault(True, is_finite)
    return Decoded(images, faults)


def decodes_in_fp32(vae: Any) -> bool:
    """Whether an image that overflows in this VAE's precision is decoded again in fp32."""
    return vae.dtype == torch.float16 and bool(vae.config.get("force_upcast", True))


def is_finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _fault(has_finite_latents: bool, has_finite_image: bool) -> Fault | None:
    if not has_finite_latents:
        return "latents"
    return None if has_finite_image else "image"


def _are_finite(batch: torch.Tensor) -> torch.Tensor:
    return batch.isfinite().flatten(1).all(dim=1)


def _range(dtype: torch.dtype) -> tuple[float, float]:
    return torch.finfo(dtype).min, torch.finfo(dtype).max


def _decode_in_fp32(vae: Any, scaled: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """One at a time, so that it takes no more memory than a few in fp16. Back in fp16 the weights are what they were."""
    dtype = vae.dtype
    with torch.inference_mode(False):  # a module's own tensors must not become inference tensors
        vae.to(torch.float32)
    try:
        images = [vae.decode(one.float(), return_dict=False, generator=generator)[0] for one in scaled.split(1)]
    finally:
        with torch.inference_mode(False):
            vae.to(dtype)
    return torch.cat(images)

"""The images that requests start from, as the VAE's latents: what `StableDiffusionImg2ImgPipeline` makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from mii_serve.engine.upload import upload
from mii_serve.types import GenerationParams, InputImage, Sample, SampleId


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image's latents, channels × height × width in float32: a distribution that each sample draws its own from.

    `std` is None where the VAE gives the latents themselves.
    """

    mean: torch.Tensor
    std: torch.Tensor | None
    scaling_factor: float

    def drawn(self, generator: torch.Generator) -> torch.Tensor:
        """The latents that a sample starts from; `generator` is the sample's own, on the CPU."""
        if self.std is None:
            return self.scaling_factor * self.mean
        noise = upload(randn_tensor((1, *self.mean.shape), generator=generator, dtype=torch.float32)[0], self.mean.device)
        return self.scaling_factor * (self.mean + self.std * noise)


def pixels_of(image: InputImage, params: GenerationParams) -> torch.Tensor:
    """The image as `VaeImageProcessor.preprocess` makes it, 1 × 3 × height × width in [-1, 1], on the CPU."""
    levels = np.frombuffer(image.rgb, np.uint8).reshape(1, params.height, params.width, 3)
    return 2.0 * torch.from_numpy((levels.astype(np.float32) / 255.0).transpose(0, 3, 1, 2)) - 1.0


def encode_images(vae: Any, samples: Sequence[Sample], max_images: int) -> dict[SampleId, EncodedImage]:
    """The latents of the samples that have an image, each image encoded once, at most `max_images` of a size in one call."""
    pixels: dict[tuple[int, int], dict[int, torch.Tensor]] = {}
    for sample in samples:
        if (image := sample.input_image) is not None:
            of_size = pixels.setdefault(sample.params.latent_shape, {})
            if id(image) not in of_size:
                of_size[id(image)] = pixels_of(image, sample.params)
    encoded: dict[int, EncodedImage] = {}
    for of_size in pixels.values():
        keys = list(of_size)
        for start in range(0, len(keys), max_images):
            batch = keys[start : start + max_images]
            encoded.update(zip(batch, _encode(vae, torch.cat([of_size[key] for key in batch])), strict=True))
    return {sample.id: encoded[id(sample.input_image)] for sample in samples if sample.input_image is not None}


def _encode(vae: Any, pixels: torch.Tensor) -> list[EncodedImage]:
    output = vae.encode(upload(pixels.contiguous(), vae.device).to(vae.dtype))
    scaling_factor = float(vae.config.scaling_factor)
    if not hasattr(output, "latent_dist"):
        return [EncodedImage(latents.float(), None, scaling_factor) for latents in output.latents]
    means, stds = output.latent_dist.mean.float(), output.latent_dist.std.float()
    return [EncodedImage(mean, std, scaling_factor) for mean, std in zip(means, stds, strict=True)]

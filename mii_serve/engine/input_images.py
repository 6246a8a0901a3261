"""The images that requests start from, as the VAE's latents: what diffusers' `StableDiffusionImg2ImgPipeline` makes of them,
and of those with a mask `StableDiffusionInpaintPipeline`.

Most models repaint by blending: the image is put back around the mask after each call. The UNet of an inpainting model takes in
the mask and the rest of the image beside the latents, and nothing is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from mii_serve.engine.upload import upload
from mii_serve.types import GenerationParams, InputImage, Sample, SampleId

LIGHT = 128
"""Where a mask is at least so light, the image is repainted."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image's latents, channels × height × width in float32: a distribution that each sample draws its own from.

    `std` is None where the VAE gives the latents themselves.
    """

    mean: torch.Tensor
    std: torch.Tensor | None
    scaling_factor: float

    def drawn(self, generator: torch.Generator) -> torch.Tensor:
        """A sample's latents of the image; `generator` is the sample's own, on the CPU."""
        if self.std is None:
            return self.scaling_factor * self.mean
        noise = upload(randn_tensor((1, *self.mean.shape), generator=generator, dtype=torch.float32)[0], self.mean.device)
        return self.scaling_factor * (self.mean + self.std * noise)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedInput:
    """A sample's image, and what its mask leaves of it, as far as they are needed."""

    image: EncodedImage | None = None
    masked_image: EncodedImage | None = None

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> EncodedInput:
        """The same on another device."""
        return EncodedInput(image=_moved(self.image, move), masked_image=_moved(self.masked_image, move))


NOTHING = EncodedInput()


def _moved(image: EncodedImage | None, move: Callable[[torch.Tensor], torch.Tensor]) -> EncodedImage | None:
    if image is None:
        return None
    return EncodedImage(move(image.mean), None if image.std is None else move(image.std), image.scaling_factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptImage:
    """What a sample with a mask keeps of its image: `mask` is 1 × height × width, 1 where the image is repainted, else 0."""

    mask: torch.Tensor
    image_latents: torch.Tensor
    noise: torch.Tensor


def mask_of(image: InputImage, params: GenerationParams) -> torch.Tensor | None:
    """The mask in latent pixels as `prepare_mask_latents` makes it, 1 × 1 × height × width, on the CPU."""
    if image.mask is None:
        return None
    levels = np.frombuffer(image.mask, np.uint8).reshape(1, 1, params.height, params.width)
    binary = torch.from_numpy((levels >= LIGHT).astype(np.float32))
    return torch.nn.functional.interpolate(binary, size=params.latent_shape)


def skip_masked_image(noise: torch.Tensor, generator: torch.Generator) -> None:
    """Draw what the pipeline draws for the latents of the masked image, which only a UNet of nine channels takes."""
    randn_tensor((1, *noise.shape[-3:]), generator=generator, dtype=torch.float32)


def keep_unmasked(states: torch.Tensor, slots: torch.Tensor, levels: torch.Tensor, kept: Sequence[KeptImage]) -> None:
    """Put the image back where the masks of the samples in these slots let it stay, as noisy as `levels` say, N × 2."""
    mask, image_latents, noise = (
        torch.stack(one) for one in zip(*((k.mask, k.image_latents, k.noise) for k in kept), strict=True)
    )
    of_image, of_noise = levels[:, :, None, None, None].unbind(dim=1)
    states[slots, 0] = (1 - mask) * (of_image * image_latents + of_noise * noise) + mask * states[slots, 0]


def pixels_of(image: InputImage, params: GenerationParams) -> torch.Tensor:
    """The image as `VaeImageProcessor.preprocess` makes it, 1 × 3 × height × width in [-1, 1], on the CPU."""
    levels = np.frombuffer(image.rgb, np.uint8).reshape(1, params.height, params.width, 3)
    return 2.0 * torch.from_numpy((levels.astype(np.float32) / 255.0).transpose(0, 3, 1, 2)) - 1.0


def masked_pixels_of(image: InputImage, params: GenerationParams) -> torch.Tensor:
    """The same without what is repainted."""
    assert image.mask is not None
    levels = torch.from_numpy(np.frombuffer(image.mask, np.uint8).reshape(1, 1, params.height, params.width).copy())
    return pixels_of(image, params) * (levels < LIGHT)


def encode_images(vae: Any, samples: Sequence[Sample], max_images: int, *, takes_mask: bool) -> dict[SampleId, EncodedInput]:
    """The latents of the samples that have an image, each image encoded once, at most `max_images` of a size in one call.

    `takes_mask`: for the UNet of an inpainting model.
    """
    pixels: dict[tuple[int, int], dict[tuple[int, bool], torch.Tensor]] = {}
    wanted: dict[SampleId, list[tuple[int, bool]]] = {}
    for sample in samples:
        if (image := sample.input_image) is not None:
            of_size, params = pixels.setdefault(sample.params.latent_shape, {}), sample.params
            wanted[sample.id] = [(id(image), is_masked) for is_masked in _parts(params, takes_mask)]
            for key in wanted[sample.id]:
                if key not in of_size:
                    of_size[key] = masked_pixels_of(image, params) if key[1] else pixels_of(image, params)
    encoded: dict[tuple[int, bool], EncodedImage] = {}
    for of_size in pixels.values():
        keys = list(of_size)
        for start in range(0, len(keys), max_images):
            batch = keys[start : start + max_images]
            encoded.update(zip(batch, _encode(vae, torch.cat([of_size[key] for key in batch])), strict=True))
    return {
        sample_id: EncodedInput(
            image=next((encoded[key] for key in keys if not key[1]), None),
            masked_image=next((encoded[key] for key in keys if key[1]), None),
        )
        for sample_id, keys in wanted.items()
    }


def _parts(params: GenerationParams, takes_mask: bool) -> tuple[bool, ...]:
    """What is encoded: the image (False), what its mask leaves of it (True), or both."""
    if not takes_mask:
        return (False,)
    return (True,) if params.strength == 1.0 else (False, True)


def _encode(vae: Any, pixels: torch.Tensor) -> list[EncodedImage]:
    output = vae.encode(upload(pixels.contiguous(), vae.device).to(vae.dtype))
    scaling_factor = float(vae.config.scaling_factor)
    if not hasattr(output, "latent_dist"):
        return [EncodedImage(latents.float(), None, scaling_factor) for latents in output.latents]
    means, stds = output.latent_dist.mean.float(), output.latent_dist.std.float()
    return [EncodedImage(mean, std, scaling_factor) for mean, std in zip(means, stds, strict=True)]

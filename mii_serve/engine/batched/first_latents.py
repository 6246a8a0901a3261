"""What a sample of the batched engine starts from: noise, an image's latents under noise, and what comes with a mask.

Everything is drawn in diffusers' order, in float32 whatever the UNet's dtype, so that every engine starts from the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from mii_serve.engine.batched.stepping import Stepping
from mii_serve.engine.capabilities import takes_mask_in
from mii_serve.engine.input_images import NOTHING, EncodedInput, KeptImage, mask_of, skip_masked_image
from mii_serve.engine.upload import upload
from mii_serve.types import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstLatents:
    """`latents` are channels × height × width. With a mask there is either a `kept_image`, which is put back after each call,
    or a `condition`, which the UNet of an inpainting model takes in beside the latents.
    """

    latents: torch.Tensor
    kept_image: KeptImage | None = None
    condition: torch.Tensor | None = None


def first_latents(
    unet: Any,
    device: torch.device,
    sample: Sample,
    stepping: Stepping,
    generator: torch.Generator,
    encoded: EncodedInput = NOTHING,
) -> FirstLatents:
    """`generator` is the sample's own, on the CPU; `encoded` is what the VAE made of its image."""
    params, image = sample.params, sample.input_image
    image_latents = None if encoded.image is None else encoded.image.drawn(generator)
    size = (1, unet.config.out_channels, *params.latent_shape)
    noise = upload(randn_tensor(size, generator=generator, dtype=torch.float32)[0], device)
    kept_image = condition = None
    if image is not None and (mask := mask_of(image, params)) is not None:
        on_device = upload(mask[0], device)
        if takes_mask_in(unet):
            assert encoded.masked_image is not None
            condition = torch.cat((on_device, encoded.masked_image.drawn(generator)))
        else:
            assert image_latents is not None and encoded.image is not None
            kept_image = KeptImage(mask=on_device, image_latents=image_latents, noise=noise)
            if encoded.image.std is not None:
                skip_masked_image(noise, generator)
    if image_latents is None or (params.has_mask and params.strength == 1.0):
        latents = noise * stepping.init_noise_sigma
    else:
        of_image, of_noise = stepping.noise_level(0)
        latents = of_image * image_latents + of_noise * noise
    return FirstLatents(latents=latents, kept_image=kept_image, condition=condition)

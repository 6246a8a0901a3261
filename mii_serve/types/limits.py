"""What a model bounds and assumes, as plain numbers, and the constants that hold for every model."""

from __future__ import annotations

from dataclasses import dataclass

LATENT_SCALE = 8
"""Pixels per latent pixel, across and down; heights and widths are multiples of it."""

MAX_IMAGE_BYTES = 8 * 1024 * 1024
"""Of the files of a request."""

IMAGE_STRENGTH, MASK_STRENGTH = 0.8, 1.0
"""Of a request with an image that names none, and with a mask, as in diffusers."""

MAX_SEED = 2**64 - 1
MAX_SCHEDULER_CHARS = 80

MAX_SIGMA = 10_000.0
"""Of a noise level that a request names; those of models with zero terminal SNR begin at 4096."""

DEFAULT_SCHEDULER = "default"
"""The sampler that is the model's own scheduler, every option of it."""

RANDOM_SEED = -1
"""In many clients: draw a seed. Protocols without types read it so; where a seed is unsigned, it is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most, and least, one request may ask for."""

    max_prompt_chars: int = 4096
    max_num_inference_steps: int = 1000
    max_guidance_scale: float = 50.0
    min_size_px: int = 64
    max_size_px: int = 1024
    max_images_per_prompt: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParts:
    """What requests need to know of the model's parts; by default Stable Diffusion v1's."""

    num_text_layers: int = 12
    num_text_tokens: int = 77
    text_width: int = 768
    num_train_timesteps: int = 1000
    embeds_guidance: bool = False
    """The UNet takes the guidance scale in with the timestep (a latent consistency model): a guided image has one row, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What a request that leaves a parameter out gets: the model's own declaration, or diffusers' defaults."""

    scheduler: str
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    height: int = 512
    width: int = 512

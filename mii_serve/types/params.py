"""What a request asks for, and what it means once nothing is left open.

`GenerationParams` is made from `RequestedParams` by `Capabilities.resolve`, which is the validation.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from mii_serve.types.embeddings import PromptEmbeds
from mii_serve.types.limits import LATENT_SCALE, MAX_SEED
from mii_serve.types.loras import NO_LORAS, LoraChoice
from mii_serve.types.prompt_syntax import PLAIN

LatentShape = tuple[int, int]
"""Height and width of latents, in latent pixels."""

BatchKey = tuple[object, ...]
"""See `GenerationParams.batch_key`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParams:
    """A request with nothing left open. A picture is a pure function of these, its index and the request's `InputImage`.

    `strength` is None where there is no such image. `has_mask`: only a part of the image is repainted. With `timesteps` or
    `sigmas` the steps are the request's own, and `num_inference_steps` is their number. `embeds_guidance` is that of
    `ModelParts`. Embeddings are in the place of a text, which is empty then. `loras` are names with scales, as asked for;
    `lora_choice` is what they come to on the server.
    """

    prompt: str = field(repr=False)
    negative_prompt: str = field(repr=False)
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float = 0.0
    num_images_per_prompt: int
    scheduler: str
    seed: int
    strength: float | None = None
    has_mask: bool = False
    clip_skip: int | None = None
    eta: float = 0.0
    prompt_syntax: str = PLAIN
    timesteps: tuple[int, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    embeds_guidance: bool = False
    prompt_embeds: PromptEmbeds | None = field(default=None, repr=False)
    negative_prompt_embeds: PromptEmbeds | None = field(default=None, repr=False)
    loras: Mapping[str, float] = field(default_factory=dict, hash=False)
    lora_choice: LoraChoice = NO_LORAS

    def seed_of(self, image_index: int) -> int:
        """Image i of a request is image 0 of the same request with seed + i (modulo 2**64)."""
        return (self.seed + image_index) & MAX_SEED

    @property
    def is_guided(self) -> bool:
        """Classifier-free guidance is on, as `StableDiffusionPipeline` decides it."""
        return self.guidance_scale > 1 and not self.embeds_guidance

    @property
    def num_skipped_steps(self) -> int:
        """The first of the `num_inference_steps`, which an image of this strength takes the place of.

        As `StableDiffusionImg2ImgPipeline.get_timesteps` counts them.
        """
        if self.strength is None:
            return 0
        return self.num_inference_steps - num_steps_left(self.num_inference_steps, self.strength)

    @property
    def num_steps(self) -> int:
        """The steps that are made."""
        return self.num_inference_steps - self.num_skipped_steps

    @property
    def num_rows(self) -> int:
        """UNet rows of one image: the prompt's, and with guidance the negative prompt's."""
        return 2 if self.is_guided else 1

    @property
    def latent_shape(self) -> LatentShape:
        return self.height // LATENT_SCALE, self.width // LATENT_SCALE

    @property
    def batch_key(self) -> BatchKey:
        """Only samples whose keys are equal can share a UNet call."""
        return self.latent_shape if self.lora_choice.shares_calls else (*self.latent_shape, self.lora_choice.parts)

    @property
    def work_per_call(self) -> int:
        """What one UNet call of one image costs: rows × latent pixels."""
        height, width = self.latent_shape
        return self.num_rows * height * width


class GenerationKwargs(TypedDict, total=False):
    """The optional parameters as keyword arguments; None is the same as left out."""

    negative_prompt: str | None
    height: int | None
    width: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    guidance_rescale: float | None
    num_images_per_prompt: int | None
    scheduler: str | None
    seed: int | None
    strength: float | None
    clip_skip: int | None
    eta: float | None
    prompt_syntax: str | None
    timesteps: Sequence[int] | None
    sigmas: Sequence[float] | None
    loras: Mapping[str, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedParams:
    """What a caller asked for, before defaults and rules; None is "left out". The images are contents of files."""

    prompt: str = field(repr=False)
    negative_prompt: str | None = field(default=None, repr=False)
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    num_images_per_prompt: int | None = None
    scheduler: str | None = None
    seed: int | None = None
    image: bytes | None = field(default=None, repr=False)
    mask_image: bytes | None = field(default=None, repr=False)
    strength: float | None = None
    clip_skip: int | None = None
    eta: float | None = None
    prompt_syntax: str | None = None
    timesteps: tuple[int, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    prompt_embeds: PromptEmbeds | None = field(default=None, repr=False)
    negative_prompt_embeds: PromptEmbeds | None = field(default=None, repr=False)
    loras: Mapping[str, float] | None = None


def num_steps_left(num_inference_steps: int, strength: float) -> int:
    """The steps that are made of an image of this strength, as diffusers counts them."""
    return min(int(num_inference_steps * strength), num_inference_steps)


def draw_seed() -> int:
    """A seed for a caller who named none: 32 bits, short enough to read out and exact as a JSON number."""
    return secrets.randbits(32)

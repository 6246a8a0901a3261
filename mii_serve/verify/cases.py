"""The fixed inputs: what each stage computes, and which pictures are drawn. The same for every engine, every time.

The sizes follow the model: its default size, and a smaller one that is not square and, where the model can make it, not a
multiple of what its UNet halves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import interpolate

from mii_serve.engine.probe import UNetCall
from mii_serve.types import LATENT_SCALE, Capabilities, GenerationParams, LatentShape

PROMPTS = {
    "a plain prompt": "a red circle on a blue background",
    "the empty prompt": "",
    "weights and brackets": "three (green squares:1.3), [black] background, 'quoted' & 100 % sharp",
    "another script": "un café à Zürich, 東京の夜 ★",
    "77 tokens exactly full": " ".join(["blue"] * 75),
    "more than 77 tokens": " ".join(["a yellow star beside a white cross,"] * 20),
}
"""The text encoder's inputs, by the name each has in the report."""

DRAWINGS = (
    # scheduler, steps, guidance, prompt, negative prompt, at the smaller size, images
    ("pndm", 12, 7.5, "a red circle on a blue background", "", False, 1),
    ("ddim", 6, 1.0, "a green square", "", False, 1),
    ("euler_a", 10, 3.0, "a yellow star on a black background", "circle", False, 1),
    ("dpm++_2m", 12, 7.5, "three green squares", "", False, 2),
    ("dpm++_2m_karras", 9, 5.0, "a blue star", "square, star", False, 1),
    ("heun", 5, 4.0, "a white cross", "blue", False, 1),
    ("unipc", 8, 0.0, "two blue circles", "not used without guidance", False, 1),
    ("lcm", 4, 1.5, "a blue square", "", False, 1),
    ("ddpm", 8, 3.0, "a purple triangle", "", True, 1),
    ("dpm++_2m_sde", 7, 3.0, "an orange ring on a white background", "", True, 1),
    ("euler_karras", 10, 1.0, "a cyan circle on a red background", "", True, 1),
    ("euler", 8, 3.0, " ".join(["a yellow star beside a white cross,"] * 20), "a red circle", False, 1),
)
"""More than a CPU's eight slots, so that some join the batch while others leave it."""

TIMESTEPS = ((999.0, 7.5), (761.0, 1.0), (520.5, 3.0), (261.0, 0.0), (41.0, 7.5), (1.0, 3.0))
"""Of single UNet calls, with their guidance. Karras samplers ask for times between whole ones."""

SMALL_TIMESTEPS = ((641.0, 5.0), (121.0, 1.0))
"""Of those at the smaller size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureCase:
    """One request to draw."""

    name: str
    params: GenerationParams

    @property
    def picture_names(self) -> list[str]:
        """The names of its pictures in the report."""
        count = self.params.num_images_per_prompt
        return [self.name] if count == 1 else [f"{self.name}, image {index}" for index in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetCase:
    """One UNet call to make; `prompt` and `negative_prompt` are names in `PROMPTS`."""

    name: str
    timestep: float
    guidance_scale: float
    prompt: str
    negative_prompt: str | None
    latents: torch.Tensor

    def call(self, embeds: dict[str, torch.Tensor]) -> UNetCall:
        """The call with the prompts as the reference has embedded them."""
        return UNetCall(
            latents=self.latents,
            timestep=self.timestep,
            prompt_embeds=embeds[self.prompt],
            negative_prompt_embeds=None if self.negative_prompt is None else embeds[self.negative_prompt],
            guidance_scale=self.guidance_scale,
        )


def small_size(capabilities: Capabilities) -> tuple[int, int]:
    """Height and width of about a third of the default picture; the default where the model or the operator allows no other."""
    limits, defaults = capabilities.limits, capabilities.defaults

    def within(px: int) -> int:
        latent_px = px // LATENT_SCALE | 1  # odd: the UNet's halvings then do not come out even
        low, high = -(-limits.min_size_px // LATENT_SCALE), limits.max_size_px // LATENT_SCALE
        return min(max(latent_px, low), high) * LATENT_SCALE

    return within(defaults.height * 3 // 4), within(defaults.width // 2)


def picture_cases(capabilities: Capabilities) -> list[PictureCase]:
    defaults, small = capabilities.defaults, small_size(capabilities)
    cases = []
    for index, (scheduler, steps, guidance, prompt, negative, is_small, images) in enumerate(DRAWINGS):
        height, width = small if is_small else (defaults.height, defaults.width)
        params = GenerationParams(
            prompt=prompt,
            negative_prompt=negative,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            num_images_per_prompt=images,
            scheduler=scheduler,
            seed=1000 + 10 * index,
            embeds_guidance=capabilities.parts.embeds_guidance,
            strength=1.0 if capabilities.needs_mask else None,
            has_mask=capabilities.needs_mask,
        )
        against = ", negative prompt" if negative and params.is_guided else ""
        name = f"{scheduler}, {steps} steps, guidance {guidance:g}{against}, {width}x{height}"
        cases.append(PictureCase(name=name, params=params))
    return cases


def unet_cases(capabilities: Capabilities, num_channels: int) -> list[UNetCase]:
    defaults, (height, width) = capabilities.defaults, small_size(capabilities)
    shapes = [(defaults.height // LATENT_SCALE, defaults.width // LATENT_SCALE)] * len(TIMESTEPS)
    shapes += [(height // LATENT_SCALE, width // LATENT_SCALE)] * len(SMALL_TIMESTEPS)
    names = list(PROMPTS)
    cases = []
    for index, ((timestep, guidance), shape) in enumerate(zip(TIMESTEPS + SMALL_TIMESTEPS, shapes, strict=True)):
        rows = "2 rows" if guidance > 1 else "1 row"
        cases.append(
            UNetCase(
                name=f"timestep {timestep:g}, {rows}, {shape[1] * LATENT_SCALE}x{shape[0] * LATENT_SCALE}",
                timestep=timestep,
                guidance_scale=guidance,
                prompt=names[index % len(names)],
                negative_prompt=names[(index + 1) % len(names)] if guidance > 1 else None,
                latents=noisy(clean_latents(index, num_channels, shape), 2000 + index, timestep),
            )
        )
    return cases


def vae_cases(capabilities: Capabilities, num_channels: int) -> dict[str, torch.Tensor]:
    """Latents to decode, by the name they have in the report."""
    defaults, (height, width) = capabilities.defaults, small_size(capabilities)
    cases = {}
    for index, (high, wide) in enumerate([(defaults.height, defaults.width)] * 3 + [(height, width)]):
        latents = clean_latents(3000 + index, num_channels, (high // LATENT_SCALE, wide // LATENT_SCALE))
        cases[f"latents {index}, {wide}x{high}"] = latents
    return cases


def clean_latents(seed: int, num_channels: int, shape: LatentShape) -> torch.Tensor:
    """Latents like a picture's: smooth areas with a little detail, of about unit size, as the scaling factor makes them."""
    generator = torch.Generator("cpu").manual_seed(seed)
    coarse = torch.randn(1, num_channels, *(math.ceil(size / 4) for size in shape), generator=generator)
    fine = torch.randn(num_channels, *shape, generator=generator)
    return interpolate(coarse, size=shape, mode="bilinear")[0] + 0.1 * fine


def noisy(latents: torch.Tensor, seed: int, timestep: float) -> torch.Tensor:
    """About what a sampler hands to the UNet at this time; the exact schedule is the model's and does not matter here."""
    angle = math.pi / 2 * timestep / 1000
    noise = torch.randn(latents.shape, generator=torch.Generator("cpu").manual_seed(seed))
    return math.cos(angle) * latents + math.sin(angle) * noise

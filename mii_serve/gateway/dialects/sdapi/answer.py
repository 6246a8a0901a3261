"""Answers in the form of that API: `images`, `parameters` and `info`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mii_serve import __version__
from mii_serve.gateway.dialects.sdapi.body import NEUTRAL, NOT_KEPT, CommonBody, ImageBody
from mii_serve.gateway.dialects.sdapi.hires import Hires
from mii_serve.gateway.dialects.sdapi.samplers import Chosen
from mii_serve.gateway.generation import to_base64, to_json
from mii_serve.types import Done, GenerationParams, ImageReady

FILES = ("init_images", "mask")


@dataclass(slots=True, kw_only=True)
class Drawn:
    """What became of a call: its images by index, fewer than were asked for where it was interrupted.

    `model` is the model's name and short hash. `done` is the last event, None where it was interrupted.
    """

    params: GenerationParams
    chosen: Chosen
    model: tuple[str, str]
    timestamp: str
    hires: Hires | None = None
    images: dict[int, ImageReady] = field(default_factory=dict)
    done: Done | None = None

    @property
    def strength(self) -> float | None:
        """Of the image that was drawn from another; None where there was no other."""
        return self.params.strength if self.hires is None else self.hires.strength

    @property
    def more_facts(self) -> dict[str, Any]:
        return {} if self.hires is None else self.hires.facts()


def answer_to_json(body: CommonBody, given: Mapping[str, Any], drawn: Drawn) -> bytes:
    """The answer; `given` is the body as it came."""
    images = [drawn.images[index] for index in sorted(drawn.images)]
    texts = [to_base64(image.encoded) for image in images]  # blocked ones are black: clients decode every one
    info = to_json(_info(body, drawn, images)).decode()
    return to_json(
        {"images": texts if body.send_images else [], "parameters": _parameters(body, given, drawn.params, drawn), "info": info}
    )


def _parameters(body: CommonBody, given: Mapping[str, Any], params: GenerationParams, drawn: Drawn) -> dict[str, Any]:
    """The members as they came; of those that were left out, what they were taken for."""
    found: dict[str, Any] = {name: values[0] for name, values in NEUTRAL.items()}
    found |= {name: None if name in FILES else getattr(body, name) for name in type(body).model_fields}
    found |= {
        "steps": params.num_inference_steps,
        "cfg_scale": params.guidance_scale,
        "width": params.width,
        "height": params.height,
        "negative_prompt": params.negative_prompt,
        "sampler_name": drawn.chosen.sampler,
        "scheduler": drawn.chosen.schedule_type,
        "denoising_strength": drawn.strength,
    }
    has_files = isinstance(body, ImageBody) and body.include_init_images
    return found | {
        name: value
        for name, value in given.items()
        if name not in NOT_KEPT and value is not None and (has_files or name not in FILES)
    }


def _info(body: CommonBody, drawn: Drawn, images: list[ImageReady]) -> dict[str, Any]:
    params, num_images = drawn.params, len(images)
    seeds = [image.seed for image in images]
    name, model_hash = drawn.model
    info: dict[str, Any] = {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * num_images,
        "negative_prompt": params.negative_prompt,
        "all_negative_prompts": [params.negative_prompt] * num_images,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": seeds[0],
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": params.width,
        "height": params.height,
        "sampler_name": drawn.chosen.sampler,
        "cfg_scale": params.guidance_scale,
        "steps": params.num_inference_steps,
        "batch_size": body.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": name,
        "sd_model_hash": model_hash,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": drawn.strength,
        "extra_generation_params": {"Schedule type": drawn.chosen.schedule_type, **drawn.more_facts},
        "index_of_first_image": 0,
        "infotexts": [_infotext(body.prompt, drawn, seed) for seed in seeds],
        "styles": [],
        "job_timestamp": drawn.timestamp,
        "clip_skip": 1 + (params.clip_skip or 0),
        "is_using_inpainting_conditioning": False,
        "version": f"mii_serve {__version__}",
        # additions
        "nsfw_content_detected": [image.nsfw_content_detected for image in images],
    }
    if any(image.moderation_blocked is not None for image in images):
        info["moderation_blocked"] = [image.moderation_blocked for image in images]
    if drawn.done is not None:
        done = drawn.done.parameters
        info["scheduler"] = done.scheduler
        dropped = {"dropped_prompt": done.dropped_prompt, "dropped_negative_prompt": done.dropped_negative_prompt}
        info |= {key: text for key, text in dropped.items() if text}
    return info


def _infotext(prompt: str, drawn: Drawn, seed: int) -> str:
    """The text that image-generation tools show and read; the prompt has its LoRAs."""
    params, (name, model_hash) = drawn.params, drawn.model
    facts = {
        "Steps": params.num_inference_steps,
        "Sampler": drawn.chosen.sampler,
        "Schedule type": drawn.chosen.schedule_type,
        "CFG scale": f"{params.guidance_scale:g}",
        "Seed": seed,
        "Size": f"{params.width}x{params.height}",
        "Model hash": model_hash,
        "Model": _quoted(name),
        "Denoising strength": None if drawn.strength is None else f"{drawn.strength:g}",
        "Clip skip": 1 + params.clip_skip if params.clip_skip else None,
        "Eta": f"{params.eta:g}" if params.eta else None,
        **drawn.more_facts,
        "Version": f"mii_serve {__version__}",
    }
    negative = f"\nNegative prompt: {params.negative_prompt}" if params.negative_prompt else ""
    return f"{prompt}{negative}\n" + ", ".join(f"{key}: {fact}" for key, fact in facts.items() if fact not in (None, ""))


def _quoted(text: str) -> str:
    """As a value in a list with commas."""
    return to_json(text).decode() if any(sign in text for sign in ',\n:"') else text

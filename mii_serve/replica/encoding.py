"""A finished picture as the bytes of a file."""

from __future__ import annotations

import json
from dataclasses import fields

from PIL import Image

from mii_serve.provenance import Origin, Provenance
from mii_serve.types import EMBEDS, PLAIN, EffectiveParameters, GenerationParams, ImageFormat, OutputOptions, Picture

ENGINE_FIELDS = ("engine", "dtype", "model", "model_revision")
"""What a file tells of the parts that made it; the device, and the note on the choice of engine, are the operator's."""

_OF_SOME = ("strength", "clip_skip", "eta", "timesteps", "sigmas", "prompt_syntax")
"""Parameters that a file tells only where they are used."""


def encode_picture(
    picture: Picture, output: OutputOptions, parameters: EffectiveParameters, seed: int, provenance: Provenance
) -> bytes:
    """Encode, with the marks of `provenance`; `parameters` and `seed` go into a PNG's text chunks where `output` asks for it.

    Raises:
        ProvenanceError: it could not be signed.
    """
    rgb, width, height = picture.rgb, picture.width, picture.height
    if not picture.nsfw_content_detected:  # a flagged picture is entirely black
        rgb = provenance.marked_pixels(rgb, width, height, output.format)
    if output.format is ImageFormat.RAW_RGB:
        return rgb
    image = Image.frombytes("RGB", (width, height), rgb)
    origin = Origin(model=parameters.model, model_revision=parameters.model_revision, is_composite=parameters.has_mask)
    texts = _texts(parameters, seed) if output.embed_metadata else None
    return provenance.write(image, output.format, origin, quality=output.quality, texts=texts)


def _texts(parameters: EffectiveParameters, seed: int) -> dict[str, str]:
    """Two text chunks: `mii_serve` for programs (JSON), `parameters` in the form image-generation tools show.

    They say what was asked for and what was done. Files are passed on, so nothing of the host goes into them.
    """
    left_out = ("lora_choice", "embeds_guidance", *EMBEDS)
    params = {one.name: getattr(parameters, one.name) for one in fields(GenerationParams) if one.name not in left_out}
    unused = [name for name in _OF_SOME if params[name] in (None, 0.0, PLAIN)]
    if not parameters.loras:
        unused.append("loras")
    if parameters.has_prompt_embeds:
        params["has_prompt_embeds"] = True
    if parameters.strength is None:
        unused.append("has_mask")
    for name in unused:
        del params[name]
    engine = {name: getattr(parameters, name) for name in ENGINE_FIELDS}
    scheduler = {
        "scheduler_class": parameters.scheduler_class,
        "scheduler_options": dict(parameters.scheduler_options),
    }
    known = {**params, "seed": seed, "num_images_per_prompt": 1, **engine, **scheduler}
    negative = f"\nNegative prompt: {parameters.negative_prompt}" if parameters.negative_prompt else ""
    settings = (
        f"Steps: {parameters.num_inference_steps}, Sampler: {parameters.scheduler}, "
        f"CFG scale: {parameters.guidance_scale:g}, Seed: {seed}, Size: {parameters.width}x{parameters.height}, "
        f"Model: {parameters.model}"
    )
    if parameters.strength is not None:
        settings += f", Denoising strength: {parameters.strength:g}"
    if parameters.clip_skip is not None:
        settings += f", Clip skip: {parameters.clip_skip + 1}"  # those tools count the layers from the last one, which is 1
    if parameters.eta:
        settings += f", Eta: {parameters.eta:g}"
    if parameters.loras:
        settings += ", LoRAs: " + " ".join(f"{name}:{scale:g}" for name, scale in parameters.loras.items())
    return {
        "mii_serve": json.dumps(known, ensure_ascii=False),
        "parameters": f"{parameters.prompt}{negative}\n{settings}",
    }

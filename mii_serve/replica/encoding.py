"""A finished picture as the bytes of a file."""

from __future__ import annotations

import io
import json
from dataclasses import fields

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mii_serve.types import EffectiveParameters, GenerationParams, ImageFormat, OutputOptions, Picture

PNG_COMPRESS_LEVEL = 1
"""A quarter of the default level's time for files a tenth larger."""

DEFAULT_QUALITY = 90

ENGINE_FIELDS = ("engine", "dtype", "model", "model_revision")
"""What a file tells of the parts that made it; the device, and the note on the choice of engine, are the operator's."""


def encode_picture(picture: Picture, output: OutputOptions, parameters: EffectiveParameters, seed: int) -> bytes:
    """Encode; `parameters` and `seed` go into a PNG's text chunks where `output` asks for it."""
    if output.format is ImageFormat.RAW_RGB:
        return picture.rgb
    image = Image.frombytes("RGB", (picture.width, picture.height), picture.rgb)
    buffer = io.BytesIO()
    match output.format:
        case ImageFormat.PNG:
            info = _metadata(parameters, seed) if output.embed_metadata else None
            image.save(buffer, "png", compress_level=PNG_COMPRESS_LEVEL, pnginfo=info)
        case ImageFormat.JPEG:
            image.save(buffer, "jpeg", quality=output.quality or DEFAULT_QUALITY)
        case ImageFormat.WEBP:
            image.save(buffer, "webp", quality=output.quality or DEFAULT_QUALITY, method=0)
    return buffer.getvalue()


def _metadata(parameters: EffectiveParameters, seed: int) -> PngInfo:
    """Two text chunks: `mii_serve` for programs (JSON), `parameters` in the form image-generation tools show.

    They say what was asked for and what was done. Files are passed on, so nothing of the host goes into them.
    """
    params = {one.name: getattr(parameters, one.name) for one in fields(GenerationParams)}
    if parameters.strength is None:
        del params["strength"], params["has_mask"]
    engine = {name: getattr(parameters, name) for name in ENGINE_FIELDS}
    scheduler = {
        "scheduler_class": parameters.scheduler_class,
        "scheduler_options": dict(parameters.scheduler_options),
    }
    info = PngInfo()
    known = {**params, "seed": seed, "num_images_per_prompt": 1, **engine, **scheduler}
    info.add_itxt("mii_serve", json.dumps(known, ensure_ascii=False))
    negative = f"\nNegative prompt: {parameters.negative_prompt}" if parameters.negative_prompt else ""
    settings = (
        f"Steps: {parameters.num_inference_steps}, Sampler: {parameters.scheduler}, "
        f"CFG scale: {parameters.guidance_scale:g}, Seed: {seed}, Size: {parameters.width}x{parameters.height}, "
        f"Model: {parameters.model}"
    )
    info.add_itxt("parameters", f"{parameters.prompt}{negative}\n{settings}")
    return info

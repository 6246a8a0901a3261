"""A finished picture as the bytes of a file."""

from __future__ import annotations

import io
import json
from dataclasses import asdict

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mii_serve.types import Effective, ImageFormat, OutputOptions, Picture

PNG_COMPRESS_LEVEL = 1
"""A quarter of the default level's time for files a tenth larger."""

DEFAULT_QUALITY = 90

ENGINE_FIELDS = ("engine", "dtype", "model", "model_revision")
"""What a file tells of the parts that made it; the device, and the note on the choice of engine, are the operator's."""


def encode_picture(picture: Picture, output: OutputOptions, effective: Effective, seed: int) -> bytes:
    """Encode; `effective` and `seed` go into a PNG's text chunks where `output` asks for it."""
    if output.format is ImageFormat.RAW_RGB:
        return picture.rgb
    image = Image.frombytes("RGB", (picture.width, picture.height), picture.rgb)
    buffer = io.BytesIO()
    match output.format:
        case ImageFormat.PNG:
            info = _metadata(effective, seed) if output.embed_metadata else None
            image.save(buffer, "png", compress_level=PNG_COMPRESS_LEVEL, pnginfo=info)
        case ImageFormat.JPEG:
            image.save(buffer, "jpeg", quality=output.quality or DEFAULT_QUALITY)
        case ImageFormat.WEBP:
            image.save(buffer, "webp", quality=output.quality or DEFAULT_QUALITY, method=0)
    return buffer.getvalue()


def _metadata(effective: Effective, seed: int) -> PngInfo:
    """Two text chunks: `mii_serve` for programs (JSON), `parameters` in the form image-generation tools show.

    They say what was asked for and what was done. Files are passed on, so nothing of the host goes into them.
    """
    params, engine = effective.params, effective.engine
    info = PngInfo()
    done = {name: getattr(engine, name) for name in ENGINE_FIELDS}
    told = {**asdict(params), "seed": seed, "num_images_per_prompt": 1, **done}
    info.add_itxt("mii_serve", json.dumps(told, ensure_ascii=False))
    negative = f"\nNegative prompt: {params.negative_prompt}" if params.negative_prompt else ""
    settings = (
        f"Steps: {params.num_inference_steps}, Sampler: {params.scheduler}, CFG scale: {params.guidance_scale:g}, "
        f"Seed: {seed}, Size: {params.width}x{params.height}, Model: {engine.model}"
    )
    info.add_itxt("parameters", f"{params.prompt}{negative}\n{settings}")
    return info

"""What all the peers share: the same pipeline, and the pictures of one request or of several that can go together."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

PARAMETERS = ("num_inference_steps", "guidance_scale", "height", "width")


def load(folder: str, cls: Any = StableDiffusionPipeline) -> Any:
    pipeline = cls.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def parameters(body: dict[str, Any]) -> dict[str, Any]:
    """What of a request the pipeline takes."""
    named = {name: body[name] for name in PARAMETERS if name in body}
    if "size" in body:
        named["width"], named["height"] = map(int, body["size"].split("x"))
    return named


def draw(pipeline: Any, bodies: list[dict[str, Any]]) -> list[Any]:
    """A picture for each request. Those with the same parameters are made together; the pipeline cannot mix others into one
    batch.
    """
    groups: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    for index, body in enumerate(bodies):
        groups.setdefault(tuple(sorted(parameters(body).items())), []).append(index)
    pictures: list[Any] = [None] * len(bodies)
    for named, indexes in groups.items():
        made = pipeline(
            [bodies[index]["prompt"] for index in indexes],
            generator=[torch.Generator("cpu").manual_seed(bodies[index]["seed"]) for index in indexes],
            **dict(named),
        ).images
        for index, picture in zip(indexes, made, strict=True):
            pictures[index] = picture
    return pictures


def answer(picture: Any) -> dict[str, Any]:
    """A picture in the answer of an images API."""
    buffer = io.BytesIO()
    picture.save(buffer, "png", compress_level=1)
    return {"created": 0, "data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}

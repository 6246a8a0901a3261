"""The model's own safety checker, applied as the diffusers pipeline applies it."""

from __future__ import annotations

from typing import Any

import torch


def checked_pictures(pipeline: Any, images: torch.Tensor) -> tuple[list[Any], list[bool] | None]:
    """Turn decoded images into RGB pictures, those the checker fires on entirely black.

    `images` is N × 3 × H × W in [-1, 1]; the flags are None where the model has no checker. Same calls in the same order as
    `StableDiffusionPipeline.__call__`.
    """
    images, flags = pipeline.run_safety_checker(images, images.device, images.dtype)
    denormalize = [True] * len(images) if flags is None else [not flag for flag in flags]
    pictures = pipeline.image_processor.postprocess(images, output_type="pil", do_denormalize=denormalize)
    return pictures, None if flags is None else [bool(flag) for flag in flags]

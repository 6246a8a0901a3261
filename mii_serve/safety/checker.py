"""The model's own safety checker, applied as the diffusers pipeline applies it.

`checked_pictures` makes the pipeline's calls. The other functions take them apart, so that what computes and what does not can
run in different threads; they give the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image


def checked_pictures(pipeline: Any, images: torch.Tensor) -> tuple[list[Any], list[bool] | None]:
    """Turn decoded images into RGB pictures, those the checker fires on entirely black.

    `images` is N × 3 × H × W in [-1, 1]; the flags are None where the model has no checker. Same calls in the same order as
    `StableDiffusionPipeline.__call__`.
    """
    images, flags = pipeline.run_safety_checker(images, images.device, images.dtype)
    denormalize = [True] * len(images) if flags is None else [not flag for flag in flags]
    pictures = pipeline.image_processor.postprocess(images, output_type="pil", do_denormalize=denormalize)
    return pictures, None if flags is None else [bool(flag) for flag in flags]


def to_rgb(images: torch.Tensor) -> torch.Tensor:
    """N × H × W × 3 in uint8, on the same device, of images N × 3 × H × W in [-1, 1]; rounded as the pipeline rounds."""
    denormalized = (images * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()
    return (denormalized * 255).round().to(torch.uint8).contiguous()


def checker_input(pipeline: Any, rgb: npt.NDArray[np.uint8]) -> torch.Tensor:
    """What the checker looks at, on the CPU. `rgb` is N × H × W × 3; nothing is computed on a device."""
    pictures = [Image.fromarray(one) for one in rgb]
    pixel_values: torch.Tensor = pipeline.feature_extractor(pictures, return_tensors="pt").pixel_values
    return pixel_values


def keep_thresholds_on_host(pipeline: Any) -> None:
    """The checker reads its thresholds one by one on the host: from a device each would wait for it."""
    checker = pipeline.safety_checker
    for name in ("concept_embeds_weights", "special_care_embeds_weights"):
        thresholds = getattr(checker, name, None)
        if thresholds is not None and thresholds.device.type != "cpu":
            setattr(checker, name, torch.nn.Parameter(thresholds.cpu(), requires_grad=False))


def flags_of(pipeline: Any, images: torch.Tensor, clip_input: torch.Tensor) -> list[bool]:
    """Whether the checker fires, of each image; it may change `images`, which are N × 3 × H × W in [-1, 1]."""
    _, flags = pipeline.safety_checker(images=images, clip_input=clip_input.to(images.device, images.dtype))
    return [bool(flag) for flag in flags]

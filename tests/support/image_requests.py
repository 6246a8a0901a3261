"""Requests with images for engines, and what diffusers' pipelines make of the same."""

from __future__ import annotations

import copy

import numpy as np
import torch
from PIL import Image, ImageDraw

from mii_serve.samplers.build import ModelSchedulers
from mii_serve.types import InputImage, RequestedParams, Sample, SampleId


def some_image(width: int = 64, height: int = 64) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    levels = np.stack([4 * x, 4 * y, 2 * (x + y)], axis=-1).astype(np.uint8)
    levels[height // 3 : height // 2, width // 4 : width // 2] = 255, 0, 0
    return Image.fromarray(levels)


def some_mask(width: int = 64, height: int = 64) -> Image.Image:
    mask = Image.new("L", (width, height), 40)
    ImageDraw.Draw(mask).ellipse((width // 6, height // 4, 2 * width // 3, 3 * height // 4), fill=200)
    return mask


def drawn_by_diffusers(model, request, image: Image.Image, seed: int, mask: Image.Image | None = None, **more) -> np.ndarray:
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    name, steps, strength, guidance_scale = request
    scheduler = ModelSchedulers(model.pipeline.scheduler)._template(name)
    pipeline_class = StableDiffusionImg2ImgPipeline if mask is None else StableDiffusionInpaintPipeline
    pipeline = pipeline_class(
        **{**model.pipeline.components, "scheduler": copy.deepcopy(scheduler)}, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    arguments = {"num_inference_steps": steps, "strength": strength, "guidance_scale": guidance_scale, **more}
    if mask is not None:
        arguments = {"height": 64, "width": 64, "mask_image": mask, **arguments}
    return np.asarray(pipeline("a red circle", image=image, generator=generator, **arguments).images[0]).astype(int)


def sample_of(engine, request, index: int, image: Image.Image | None, mask: Image.Image | None = None) -> Sample:
    name, steps, strength, guidance_scale = request
    asked = RequestedParams(
        prompt="a red circle",
        height=64,
        width=64,
        scheduler=name,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        seed=40 + index,
        image=None if image is None else b"its file",
        mask_image=None if mask is None else b"its file",
        strength=None if image is None else strength,
    )
    params = engine.capabilities.resolve(asked, fallback_seed=0)
    input_image = None if image is None else InputImage(rgb=image.tobytes(), mask=None if mask is None else mask.tobytes())
    return Sample(id=SampleId(f"r{index}", 0), params=params, input_image=input_image)


def levels(picture) -> np.ndarray:
    return np.frombuffer(picture.rgb, np.uint8).reshape(picture.height, picture.width, 3).astype(int)

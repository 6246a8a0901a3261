"""Is the reference what diffusers itself draws? Checked before any engine is compared with the reference.

The same folder is loaded by `StableDiffusionPipeline.from_pretrained`, nothing of our loader, samplers or loop taking part, and
called as its users call it: once as it comes, once with a scheduler put in by hand. Both are never in memory together.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image

from mii_serve.config import DeployConfig, LimitsConfig
from mii_serve.engine import Engine
from mii_serve.engine.probe import ProbedEngine
from mii_serve.engine.warmup import input_image_of
from mii_serve.errors import InvalidRequestError
from mii_serve.models import RANDOM_SD_V1_4
from mii_serve.models.check import CheckedFolder, check_folder
from mii_serve.models.defaults import DeclaredDefaults, read_defaults
from mii_serve.models.given_embedding import find_embedding
from mii_serve.models.given_vae import find_vae
from mii_serve.models.quiet import quiet_libraries
from mii_serve.models.single_file.check import CheckedFile, check_file
from mii_serve.models.single_file.configs import write_configs
from mii_serve.models.source import find_model
from mii_serve.types import DEFAULT_SCHEDULER, GenerationParams, Picture, RequestedParams
from mii_serve.verify.cases import PictureCase
from mii_serve.verify.drawing import draw

logger = logging.getLogger(__name__)

PROMPT = "a red circle on a blue background"
SEED = 4000
NUM_STEPS = 12
"""Of these pictures; the only parameter that is not diffusers' own default, which is 50 steps."""

DEFAULT, NAMED = "the default request", "the scheduler ddim"
CHECKED = "the default request, safety checker on"
NOT_FOUND = "diffusers' own pipeline"


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePair:
    """A picture by the reference, and diffusers' own; `fault` where one of them is missing."""

    ours: Picture | None = field(default=None, repr=False)
    plain: Picture | None = field(default=None, repr=False)
    fault: str = ""


def draw_with_reference(engine: Engine, config: DeployConfig) -> tuple[dict[str, Picture], dict[str, str], GenerationParams]:
    """The pictures by name, those that the reference refuses, and the default request."""
    assert isinstance(engine, ProbedEngine)
    asked = RequestedParams(prompt=PROMPT, num_inference_steps=NUM_STEPS, seed=SEED, scheduler=DEFAULT_SCHEDULER)
    asked = engine.capabilities.with_mask_if_needed(asked)
    pictures: dict[str, Picture] = {}
    refused: dict[str, str] = {}
    wanted = {DEFAULT: asked, NAMED: replace(asked, scheduler="ddim"), CHECKED: asked}
    default = engine.capabilities.resolve(asked, fallback_seed=SEED)
    for name, request in wanted.items():
        if name == CHECKED and not engine.description.has_safety_checker:
            continue
        try:
            params = engine.capabilities.resolve(request, fallback_seed=SEED)
            engine.check(params)
        except InvalidRequestError as error:
            refused[name] = str(error)
            continue
        with contextlib.nullcontext() if name == CHECKED else engine.probe().without_checker():
            pictures |= draw(engine, [PictureCase(name=name, params=params)])
    return pictures, refused, default


def compare_with_diffusers(
    config: DeployConfig, ours: Mapping[str, Picture], params: GenerationParams, device: str
) -> dict[str, PipelinePair]:
    """Load the model once more, as diffusers does it, and draw each of our pictures with it.

    Raises:
        ModelError: it cannot be found; it was, a moment before.
    """
    if config.model == RANDOM_SD_V1_4:
        return {}
    try:
        with quiet_libraries():
            plain = _draw(config, list(ours), params, device)
    except Exception as error:  # of diffusers, about a folder that we can load: a fault of one of us
        logger.exception("diffusers' own pipeline failed")
        return {DEFAULT: PipelinePair(fault=f"diffusers cannot draw it: {type(error).__name__}: {error}")}
    return {name: PipelinePair(ours=picture, plain=plain[name]) for name, picture in ours.items()}


def _settings(config: DeployConfig) -> dict[str, Any]:
    return {
        "dtype": "fp32",
        "allow_pickle": config.allow_pickle,
        "enable_safety_checker": config.enable_safety_checker,
    }


def _draw(config: DeployConfig, names: list[str], params: GenerationParams, device: str) -> dict[str, Picture]:
    found = find_model(config.model, revision=config.revision, **_settings(config))
    if found.file is None:
        declared = read_defaults(found.folder)
        pipeline = _load(check_folder(found.folder, **_settings(config))).to(device)
    else:
        declared = DeclaredDefaults()
        checked = check_file(found.file, allow_pickle=config.allow_pickle, tokenizer=config.tokenizer)
        pipeline = _load_file(checked).to(device)
    if config.vae is not None:
        pipeline.vae = find_vae(config.vae, dtype="fp32", allow_pickle=config.allow_pickle).load(
            dtype="fp32", device=torch.device(device)
        )
    for token, path in config.embedding.items():
        vectors = find_embedding(token, path, allow_pickle=config.allow_pickle).vectors()
        pipeline.load_textual_inversion(vectors, token=token)
    pipeline.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"num_inference_steps": NUM_STEPS}
    if declared != DeclaredDefaults() or config.limits != LimitsConfig():
        arguments |= {"guidance_scale": params.guidance_scale, "height": params.height, "width": params.width}
    if (image := input_image_of(params)) is not None:
        size = params.width, params.height
        arguments |= {"image": Image.frombytes("RGB", size, image.rgb), "height": params.height, "width": params.width}
        arguments["mask_image"] = Image.frombytes("L", size, image.mask or b"")
        pipeline = StableDiffusionInpaintPipeline(**pipeline.components, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
    checker, scheduler = pipeline.safety_checker, pipeline.scheduler
    pictures = {}
    for name in names:
        pipeline.safety_checker = checker if name == CHECKED else None
        pipeline.scheduler = _ddim(scheduler) if name == NAMED else scheduler
        result = pipeline(PROMPT, generator=torch.Generator("cpu").manual_seed(SEED), **arguments)
        image, flags = result.images[0].convert("RGB"), result.nsfw_content_detected
        pictures[name] = Picture(
            width=image.width,
            height=image.height,
            rgb=image.tobytes(),
            nsfw_content_detected=None if flags is None else bool(flags[0]),
        )
    return pictures


def _load(checked: CheckedFolder) -> Any:
    found = [part.weights for part in checked.parts.values() if part.weights is not None]
    options: dict[str, Any] = {"variant": next((each.variant for each in found if each.variant), None)}
    if all(each.is_pickle for each in found):
        options["use_safetensors"] = False
    if "safety_checker" not in checked.parts:
        options |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    folder = str(checked.folder)
    return StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True, **options)


def _load_file(checked: CheckedFile) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        write_configs(checked.configs, checked.tokenizer, Path(folder))
        return StableDiffusionPipeline.from_single_file(
            str(checked.weights.path), config=folder, torch_dtype=torch.float32, local_files_only=True
        )


def _ddim(scheduler: Any) -> Any:
    """DDIM as Stable Diffusion means it, whatever the model's own scheduler is."""
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False, steps_offset=1)

"""What a user of diffusers gets from a model folder, and what our engines make of the same folder.

Nothing of ours takes part in the first: `StableDiffusionPipeline.from_pretrained(folder)`, called.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from scheduler_configs import NAMED

from mii_serve.config import LimitsConfig
from mii_serve.engine import Engine
from mii_serve.engine.factory import native_engine
from mii_serve.engine.reference import ReferenceEngine
from mii_serve.errors import MiiServeError
from mii_serve.models import LoadedModel, load_model
from mii_serve.models.quiet import quiet_libraries
from mii_serve.types import Picture, RequestedParams, Sample, SampleId, StepPlan

PROMPT = "a red circle on a blue background"
SEED = 3
LEVELS_OFF = {"reference": 0, "native": 1}
"""Of 255, in any pixel: what each engine may differ from diffusers itself in float32."""

Drawn = Mapping[str, Any]
"""By the name of the request: its picture, an error's text, or None where diffusers itself makes nothing finite."""


def plain_pipeline(folder: Path, **options: Any) -> Any:
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_picture(pipeline: Any, prompt: str = PROMPT, **arguments: Any) -> np.ndarray | None:
    """Height × width × 3 in levels of 255; None where the pipeline refuses, or its picture is not finite."""
    generator = torch.Generator().manual_seed(SEED)
    with quiet_libraries(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            picture = pipeline(prompt, generator=generator, **arguments).images[0]
        except (ArithmeticError, LookupError, ValueError):
            return None
    if any("invalid value encountered in cast" in str(warning.message) for warning in said):
        return None
    return np.asarray(picture.convert("RGB")).astype(int)


def with_named_sampler(pipeline: Any, name: str) -> Any:
    """The pipeline with the sampler of this name put in, as its documentation tells users to."""
    class_name, overrides = NAMED[name]
    with quiet_libraries():
        scheduler = getattr(diffusers, class_name).from_config(pipeline.scheduler.config, **overrides)
        parts = {**pipeline.components, "scheduler": scheduler}
        other = StableDiffusionPipeline(**parts, requires_safety_checker=pipeline.config.requires_safety_checker)
    other.set_progress_bar_config(disable=True)
    return other


def our_model(folder: Path, *, allow_pickle: bool = False) -> LoadedModel:
    limits = LimitsConfig(min_size_px=32)
    return load_model(str(folder), revision=None, dtype="fp32", device="cpu", allow_pickle=allow_pickle, limits=limits)


def our_engine(name: str, model: LoadedModel) -> Engine:
    return {"reference": ReferenceEngine, "native": native_engine}[name](model)


def our_pictures(engine: Engine, requests: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Draw the requests together, as many at once as the engine holds; what is refused or fails has its error as text."""
    made: dict[str, Any] = {}
    waiting: list[Sample] = []
    num_calls: dict[SampleId, int] = {}
    for name, asked in requests.items():
        try:
            params = engine.capabilities.resolve(RequestedParams(**{"prompt": PROMPT, "seed": SEED, **asked}), fallback_seed=0)
            sample = Sample(id=SampleId(name, 0), params=params)
            num_calls[sample.id] = engine.check(params)
            waiting.append(sample)
        except MiiServeError as error:
            made[name] = f"{type(error).__name__}: {error}"
    calls_left: dict[SampleId, int] = {}
    while waiting or calls_left:
        joins = [waiting.pop(0) for _ in range(min(len(waiting), engine.capacity.max_slots - len(calls_left)))]
        calls_left |= {sample.id: num_calls[sample.id] for sample in joins}
        ending = [one for one, left in calls_left.items() if left == 1]
        plan = StepPlan(joins=tuple(joins), steps=tuple(calls_left), decodes=tuple(ending))
        for progress in engine.run(plan):
            calls_left[progress.id] -= 1
            if progress.error is not None:
                made[progress.id.request_id] = f"{type(progress.error).__name__}: {progress.error}"
            elif progress.picture is not None:
                made[progress.id.request_id] = levels(progress.picture)
            if progress.is_over:
                calls_left.pop(progress.id)
    return made


def levels(picture: Picture) -> np.ndarray:
    return np.frombuffer(picture.rgb, np.uint8).reshape(picture.height, picture.width, 3).astype(int)


def faults(expected: Drawn, made: Drawn, allowed: int) -> dict[str, str]:
    """What is wrong with each of our pictures; what diffusers cannot make, we must not hand out."""
    found = {}
    for name, true in expected.items():
        ours = made[name]
        if true is None:
            if not isinstance(ours, str):
                found[name] = "a picture where diffusers makes none that is finite"
        elif isinstance(ours, str):
            found[name] = ours
        elif ours.shape != true.shape:
            found[name] = f"the shape {ours.shape}, not {true.shape}"
        elif (off := int(np.abs(ours - true).max())) > allowed:
            found[name] = f"{off} levels off"
    return found


def told(wrong: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {fault}" for name, fault in wrong.items())


def with_text_layers(model: LoadedModel, num_layers: int) -> LoadedModel:
    """The model with a random text encoder of so many layers."""
    from transformers import CLIPTextModel

    config = copy.deepcopy(model.pipeline.text_encoder.config)
    config.num_hidden_layers = num_layers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = CLIPTextModel(config).eval().requires_grad_(False)
    # As in trained models, its mean is not 0, by which a weighted chunk is scaled.
    getattr(encoder, "text_model", encoder).final_layer_norm.bias.add_(0.3)
    parts = {**model.pipeline.components, "text_encoder": encoder}
    return replace(model, pipeline=StableDiffusionPipeline(**parts, requires_safety_checker=False))

"""`random-sd-v1-4`: a pipeline of the size and shape of Stable Diffusion v1-4 with random weights, for benchmarks.

It costs what the real one costs, UNet call for UNet call, but its pictures are noise. It is built on the device and in the
requested precision, without a copy on the CPU. The weights are seeded: the same everywhere on the same kind of device with
the same torch; a GPU's generator differs from the CPU's.

What differs from the real one: the tokenizer is the demo model's (the real vocabulary is not part of this package), so a
prompt has other tokens, though always 77 of them after padding; and the safety checker, though of full size, never fires.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mii_serve.errors import ModelError
from mii_serve.models import RANDOM_SD_V1_4
from mii_serve.models.families import SD_V1_4, PipelineShape
from mii_serve.models.fingerprint import short_digest
from mii_serve.models.loading import TORCH_DTYPES, make_pipeline
from mii_serve.models.source import DEMO_FOLDER

if TYPE_CHECKING:
    from mii_serve.models import Precision

SEED = 0
NEVER = 2.0
"""A threshold above every cosine similarity, so that no concept is ever detected."""


def load_random(
    *, revision: str | None, dtype: Precision, device: torch.device, enable_safety_checker: bool
) -> tuple[StableDiffusionPipeline, str]:
    """The full-size pipeline, and what names it.

    Raises:
        ModelError
    """
    if revision is not None:
        raise ModelError(f"revision {revision} is of no use: {RANDOM_SD_V1_4} is not from the hub. Leave it out")
    tokenizer_folder = DEMO_FOLDER / "tokenizer"
    if not tokenizer_folder.is_dir():
        raise ModelError(
            f"{RANDOM_SD_V1_4} borrows the demo model's tokenizer, which is missing from this installation"
            f" ({tokenizer_folder}). Install mii_serve again"
        )
    pipeline = build_random_pipeline(
        SD_V1_4,
        tokenizer_folder=tokenizer_folder,
        dtype=TORCH_DTYPES[dtype],
        device=device,
        enable_safety_checker=enable_safety_checker,
    )
    described = json.dumps({"seed": SEED, **asdict(SD_V1_4)}, sort_keys=True)
    return pipeline, short_digest(hashlib.sha256(described.encode()).hexdigest())


def build_random_pipeline(
    shape: PipelineShape,
    *,
    tokenizer_folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    enable_safety_checker: bool = True,
) -> StableDiffusionPipeline:
    """A pipeline of any shape; on the device `meta` it has every tensor's shape and no memory."""
    parts: dict[str, Any] = {
        "tokenizer": CLIPTokenizer.from_pretrained(str(tokenizer_folder), local_files_only=True),
        "scheduler": PNDMScheduler.from_config(dict(shape.scheduler)),
    }
    with _building_on(device, dtype):
        parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**shape.text_encoder))
        parts["unet"] = UNet2DConditionModel(**shape.unet)
        parts["vae"] = AutoencoderKL(**shape.vae)
        if enable_safety_checker:
            parts["safety_checker"] = _safety_checker(shape.safety_vision)
    if enable_safety_checker:
        size = shape.safety_vision["image_size"]
        parts["feature_extractor"] = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    for name in ("text_encoder", "unet", "vae", "safety_checker"):
        if name in parts:
            parts[name].requires_grad_(False).eval()
    return make_pipeline(parts)


@contextmanager
def _building_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """New modules get their seeded random weights where they will live; the process's own generators stay untouched."""
    before = torch.get_default_dtype()
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.device(device):
        torch.manual_seed(SEED)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _safety_checker(vision: Mapping[str, Any]) -> StableDiffusionSafetyChecker:
    unused_text = CLIPTextConfig(  # the class wants one and makes nothing of it
        vocab_size=2, bos_token_id=0, eos_token_id=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    config = CLIPConfig(text_config=unused_text.to_dict(), vision_config=dict(vision), projection_dim=vision["projection_dim"])
    checker = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(NEVER)
        checker.special_care_embeds_weights.fill_(NEVER)
    return checker

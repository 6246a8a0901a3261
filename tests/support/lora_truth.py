"""Draws the images of `CASES` with diffusers' own LoRA loader, and keeps them beside the tests, side by side in one file.

It needs PEFT, which diffusers imports in every process once it is installed, and which the server and its tests do without. So
it is run by hand, from the root of the repository, in an environment that has it:

    PYTHONPATH=.:tests/support python tests/support/lora_truth.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lora_files import all_linear, attentions, everything, nothing, of_text_encoder, write_lora
from PIL import Image

TRUTH = Path(__file__).resolve().parents[1] / "numeric" / "loras_by_peft.png"
PROMPT = "a red circle on a blue background"
CALL: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 3.0}
SEED = 3

CASES: list[dict[str, float]] = [
    {},
    {"plain": 1.0},
    {"text": 0.8},
    {"wide": 1.0},
    {"plain": 0.5, "text": -0.7},
    {"conv": 0.8},
    {"deep": 1.0},
]
FILES = ("plain", "text", "wide", "conv", "deep")
"""The LoRAs that diffusers loads as they are; `write_loras` writes two more, one of them in PEFT's own folder."""


def write_loras(folder: Path, pipeline: Any) -> dict[str, Path]:
    """LoRAs of different formats, ranks and layers."""
    return {
        "plain": write_lora(folder / "plain.safetensors", pipeline, wanted=attentions, seed=1),
        "text": write_lora(folder / "text.safetensors", pipeline, seed=2, text=of_text_encoder, kind="kohya", alpha=2.0),
        "wide": write_lora(folder / "wide.safetensors", pipeline, seed=3, wanted=all_linear, rank=12, kind="kohya"),
        "conv": write_lora(folder / "conv.safetensors", pipeline, seed=5, wanted=everything, kind="kohya", strength=0.1),
        "deep": write_lora(folder / "deep.safetensors", pipeline, seed=6, rank=80),
        "words": write_lora(folder / "words.safetensors", pipeline, seed=7, wanted=nothing, text=of_text_encoder),
        "peft": write_lora(folder / "peft", pipeline, seed=4, kind="peft", alpha=8.0),
    }


def main() -> int:
    from diffusers import StableDiffusionPipeline

    import mii_serve.models

    pipeline = StableDiffusionPipeline.from_pretrained(
        Path(mii_serve.models.__file__).parent / "demo", safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_loras(Path(folder), pipeline)
        for name in FILES:
            pipeline.load_lora_weights(str(paths[name]), adapter_name=name)
    images = []
    for case in CASES:
        if case:
            pipeline.enable_lora()
            pipeline.set_adapters(list(case), list(case.values()))
        else:
            pipeline.disable_lora()
        made = pipeline(PROMPT, generator=torch.Generator().manual_seed(SEED), **CALL).images[0]
        images.append(np.asarray(made.convert("RGB")))
    Image.fromarray(np.concatenate(images, axis=1)).save(TRUTH, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

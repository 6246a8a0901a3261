"""Stage `assemble`: put the trained parts together as one diffusers folder, float16, with nothing of this machine in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer

from .unet import BETAS
from .world import PICTURE_PX

SCHEDULER_CONFIG = {
    **BETAS,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,  # in v1-4's own file too: a DDIM scheduler built from this one would otherwise clip latents
}
DEFAULTS = {
    "scheduler": "dpm++_2m",
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "height": PICTURE_PX,
    "width": PICTURE_PX,
    "min_size_px": 32,
    "max_size_px": 256,
}
"""What a request that leaves these out gets, and the sizes this model can be asked for."""


def assemble(work: Path, out: Path) -> None:
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "hardened_vae").half(),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder").half(),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(work / "unet").half(),
        scheduler=PNDMScheduler.from_config(SCHEDULER_CONFIG),
        safety_checker=StableDiffusionSafetyChecker.from_pretrained(work / "safety_checker").half(),
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": PICTURE_PX}, crop_size={"height": PICTURE_PX, "width": PICTURE_PX}
        ),
    )
    shutil.rmtree(out, ignore_errors=True)
    pipeline.save_pretrained(out)
    for name in ("vocab.json", "merges.txt"):  # older transformers read these and not tokenizer.json
        shutil.copy(work / "tokenizer" / name, out / "tokenizer" / name)
    (out / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    _prefix_tensors(out / "text_encoder" / "model.safetensors", "", "text_model.")
    _prefix_tensors(out / "safety_checker" / "model.safetensors", "vision_model.", "vision_model.")
    _clean_configs(out)
    (out / "mii_serve_defaults.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n", encoding="utf-8")


def _prefix_tensors(path: Path, start: str, prefix: str) -> None:
    """Name tensors as the published v1-4 files do: transformers 4 reads only those names, transformers 5 both."""
    tensors = load_file(path)
    renamed = {(prefix + name if name.startswith(start) else name): value for name, value in tensors.items()}
    save_file(renamed, path, metadata={"format": "pt"})


def _clean_configs(out: Path) -> None:
    """Drop paths of the training machine, and name the image processor as every transformers version knows it."""
    for path in set(out.rglob("*.json")) - {out / "tokenizer" / "vocab.json"}:
        text = path.read_text(encoding="utf-8").replace("CLIPImageProcessorPil", "CLIPImageProcessor")
        config = json.loads(text)
        if isinstance(config, dict):
            config.pop("_name_or_path", None)
            # transformers 5 would load a part in its stored precision while diffusers loads in float32.
            config.update({key: "float32" for key in ("dtype", "torch_dtype") if key in config})
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""What the builders of model folders have in common: a copy of the demo model, and changes of its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mii_serve.models.source import DEMO_FOLDER

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "safety_checker": "model",
}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`ours` is where we are pointed at, below the folder's parent; the folder itself when it is empty."""

    plain: Mapping[str, Any] = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)
    allow_pickle: bool = False
    ours: str = ""


Builder = Callable[[Path], Layout | None]
FP32 = {"torch_dtype": torch.float32}
"""Said to diffusers where a file holds halves: transformers leaves them as they are otherwise."""


def copy_of_the_demo(folder: Path) -> Path:
    shutil.copytree(DEMO_FOLDER, folder)
    (folder / "mii_serve_defaults.json").unlink()
    threshold(folder, 2.0)
    return folder


def threshold(folder: Path, value: float) -> None:
    """Of every concept: a checker with 2 never fires, with -2 it always does. A picture of few steps looks like anything."""

    def change(tensors: Tensors) -> Tensors:
        return {n: torch.full_like(t, value) if n == "concept_embeds_weights" else t for n, t in tensors.items()}

    rewrite(weights(folder, "safety_checker"), change)


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def keep(content: dict[str, Any], *keys: str) -> None:
    for key in set(content) - set(keys):
        del content[key]


def index(folder: Path, **entries: Any) -> None:
    edit(folder / "model_index.json", lambda content: content.update(entries))


def scheduler(folder: Path, class_name: str, **options: Any) -> None:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    config = {"_class_name": class_name, **betas, **options}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index(folder, scheduler=["diffusers", class_name])


def weights(folder: Path, part: str) -> Path:
    return folder / part / f"{WEIGHTS[part]}.safetensors"


def rewrite(file: Path, change: Callable[[Tensors], Tensors], to: Path | None = None) -> None:
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, to or file, {"format": "pt"})


def halves(tensors: Tensors) -> Tensors:
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def wrong(tensors: Tensors) -> Tensors:
    """Weights that must not be loaded."""
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def shard(folder: Path, part: str, *, variant: str = "") -> None:
    """Into two files and an index, as `save_pretrained(max_shard_size=...)` leaves them."""
    stem, middle = WEIGHTS[part], f".{variant}" if variant else ""
    tensors = load_file(weights(folder, part))
    if variant:
        tensors = halves(tensors)
    names, where = sorted(tensors), {}
    for number, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}{middle}-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / part / file, {"format": "pt"})
        where |= dict.fromkeys(chosen, file)
    said = {"metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())}, "weight_map": where}
    (folder / part / f"{stem}.safetensors.index{middle}.json").write_text(json.dumps(said))
    weights(folder, part).unlink()

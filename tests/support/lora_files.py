"""Writes LoRAs with random numbers for a pipeline, in the formats in which people have them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""`down` and `up` of each layer."""


def attentions(name: str) -> bool:
    return ".attn" in name and ".to_" in name


def all_linear(name: str) -> bool:
    """Of the transformers, and what depends on the timestep."""
    return attentions(name) or ".ff.net" in name or name.endswith((".proj_in", ".proj_out", "time_emb_proj"))


def everything(name: str) -> bool:
    return True


def nothing(name: str) -> bool:
    return False


def of_text_encoder(name: str) -> bool:
    return "self_attn" in name or ".mlp." in name


def random_pairs(
    module: nn.Module, wanted: Callable[[str], bool], *, rank: int, seed: int, strength: float = 0.2
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Changes of about `strength` times the size of the weights."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and wanted(name):
            outputs, inputs, *kernel = layer.weight.shape
            down = torch.randn(rank, inputs, *kernel, generator=generator)
            up = torch.randn(outputs, rank, *(1 for _ in kernel), generator=generator)
            size = strength * float(layer.weight.float().std()) / rank**0.5
            pairs[name] = (down, up * size)
    return pairs


def write_lora(
    path: Path,
    pipeline: Any,
    *,
    wanted: Callable[[str], bool] = attentions,
    text: Callable[[str], bool] | None = None,
    rank: int = 4,
    seed: int = 0,
    strength: float = 0.2,
    kind: str = "diffusers",
    alpha: float | None = None,
) -> Path:
    """`kind` is "diffusers" or "kohya", a file, or "peft", a folder of a UNet's LoRA."""
    unet = random_pairs(pipeline.unet, wanted, rank=rank, seed=seed, strength=strength)
    encoder = random_pairs(pipeline.text_encoder, text, rank=rank, seed=seed + 1, strength=strength) if text else {}
    encoder = {f"text_model.{name.removeprefix('text_model.')}": pair for name, pair in encoder.items()}
    tensors: dict[str, torch.Tensor] = {}
    if kind == "peft":
        assert not encoder
        path.mkdir(parents=True)
        for name, (down, up) in unet.items():
            tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha or rank}
        (path / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, path / "adapter_model.safetensors")
        return path
    for prefix, pairs in (("unet", unet), ("text_encoder", encoder)):
        for name, (down, up) in pairs.items():
            if kind == "kohya":
                named = f"lora_{'te' if prefix == 'text_encoder' else prefix}_{name.replace('.', '_')}"
                tensors |= {f"{named}.lora_down.weight": down, f"{named}.lora_up.weight": up}
                tensors[f"{named}.alpha"] = torch.tensor(float(rank if alpha is None else alpha))
            else:
                tensors |= {f"{prefix}.{name}.lora_A.weight": down, f"{prefix}.{name}.lora_B.weight": up}
    save_file(tensors, path)
    return path

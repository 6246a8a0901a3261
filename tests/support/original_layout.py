"""Writes a diffusers pipeline as one file in the layout of the original Stable Diffusion code.

By the rule of diffusers' own script `convert_diffusers_to_original_stable_diffusion.py`, for any number of levels and layers,
and for v2's text encoder by OpenCLIP's names, with the last layer that v2 has and does not use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def original_tensors(pipeline: Any, *, is_v2: bool = False) -> Tensors:
    text = _open_clip(pipeline.text_encoder) if is_v2 else _clip(pipeline.text_encoder)
    return {**_unet(pipeline.unet), **vae_tensors(pipeline.vae), **text}


def save_original(pipeline: Any, file: Path, *, is_v2: bool = False, metadata: dict[str, str] | None = None) -> Path:
    tensors = original_tensors(pipeline, is_v2=is_v2)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file, metadata)
    return file


def _unet(unet: Any) -> Tensors:
    levels, layers = len(unet.config.block_out_channels), unet.config.layers_per_block
    prefixes = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    prefixes |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    for level in range(levels):
        for layer in range(layers):
            block = (layers + 1) * level + layer + 1
            prefixes[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{block}.0"
            prefixes[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{block}.1"
        prefixes[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(layers + 1) * (level + 1)}.0.op"
        for layer in range(layers + 1):
            block = (layers + 1) * level + layer
            prefixes[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{block}.0"
            prefixes[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{block}.1"
        index = 2 if hasattr(unet.up_blocks[level], "attentions") else 1
        prefixes[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{(layers + 1) * level + layers}.{index}"
    prefixes |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    prefixes["mid_block.resnets.1"] = "middle_block.2"
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
    inner |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    return _renamed(unet, "model.diffusion_model.", prefixes, {".resnets.": inner})


def vae_tensors(vae: Any) -> Tensors:
    levels = len(vae.config.block_out_channels)
    prefixes = {name: name for name in ("quant_conv", "post_quant_conv")}
    for side in ("encoder", "decoder"):
        prefixes |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out"}
        prefixes[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        prefixes |= {f"{side}.mid_block.resnets.{i}": f"{side}.mid.block_{i + 1}" for i in range(2)}
        prefixes[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
        blocks, short, sampler = ("down_blocks", "down", "downsample") if side == "encoder" else ("up_blocks", "up", "upsample")
        for level in range(levels):
            there = level if side == "encoder" else levels - 1 - level
            for layer in range(vae.config.layers_per_block + 1):
                prefixes[f"{side}.{blocks}.{level}.resnets.{layer}"] = f"{side}.{short}.{there}.block.{layer}"
            prefixes[f"{side}.{blocks}.{level}.{sampler}rs.0"] = f"{side}.{short}.{there}.{sampler}"
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    inner = {".resnets.": {"conv_shortcut": "nin_shortcut"}, ".attentions.": attention}
    tensors = _renamed(vae, "first_stage_model.", prefixes, inner)
    return {
        name: tensor[..., None, None] if ".attn_1." in name and tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }


def _clip(text_encoder: Any) -> Tensors:
    prefix = "cond_stage_model.transformer.text_model."
    tensors = {prefix + name.removeprefix("text_model."): t for name, t in text_encoder.state_dict().items()}
    return tensors | {f"{prefix}embeddings.position_ids": torch.arange(77)[None]}


def _open_clip(text_encoder: Any) -> Tensors:
    state = {name.removeprefix("text_model."): tensor for name, tensor in text_encoder.state_dict().items()}
    found = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": torch.eye(text_encoder.config.hidden_size),
        "logit_scale": torch.tensor(4.6),
    }
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
    inner |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    num_layers = text_encoder.config.num_hidden_layers
    for layer in range(num_layers + 1):
        own = f"encoder.layers.{min(layer, num_layers - 1)}."
        for leaf in ("weight", "bias"):
            parts = [state[f"{own}self_attn.{each}_proj.{leaf}"] for each in "qkv"]
            found[f"transformer.resblocks.{layer}.attn.in_proj_{leaf}"] = torch.cat(parts)
            for new, old in inner.items():
                found[f"transformer.resblocks.{layer}.{old}.{leaf}"] = state[f"{own}{new}.{leaf}"]
    return {f"cond_stage_model.model.{name}": tensor for name, tensor in found.items()}


def _renamed(module: Any, prefix: str, prefixes: dict[str, str], inner: dict[str, dict[str, str]]) -> Tensors:
    found = {}
    for name, tensor in module.state_dict().items():
        [new] = [new for new in prefixes if name.startswith(f"{new}.")]
        stem, _, leaf = name.removeprefix(f"{new}.").rpartition(".")
        table = next((table for mark, table in inner.items() if mark in name), {})
        stem = table.get(stem, stem)
        found[f"{prefix}{prefixes[new]}.{stem}.{leaf}" if stem else f"{prefix}{prefixes[new]}.{leaf}"] = tensor
    return found

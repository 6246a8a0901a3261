"""What a file of weights holds, judged by the names and shapes of its tensors alone. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from mii_serve.errors import ModelError

Shapes = Mapping[str, Sequence[int]]
Family = Literal["v1", "v2"]

UNET, VAE, TEXT_ENCODER = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
CONV_IN = f"{UNET}input_blocks.0.0.weight"
LATENT_CHANNELS, INPAINTING_CHANNELS = 4, 9
_PREFIXES = {"UNet": UNET, "VAE": VAE, "text encoder": TEXT_ENCODER}

_LORA = re.compile(r"lora_(up|down|A|B)\.|[._]lora\.(up|down)\.|\.lora_(A|B)$|\.(hada_w1_a|lokr_w1)")
_MODELS: Sequence[tuple[tuple[str, ...], str]] = (
    (("conditioner.embedders.", f"{UNET}label_emb."), "a Stable Diffusion XL checkpoint"),
    (("control_model.", "controlnet_cond_embedding."), "a ControlNet"),
    (
        (f"{UNET}double_blocks.", f"{UNET}joint_blocks.", "double_blocks.", "joint_blocks.", "transformer_blocks."),
        "a diffusion transformer, as in Stable Diffusion 3 and FLUX",
    ),
    (("down_blocks.0.motion_modules.",), "an AnimateDiff motion module"),
)
_PARTS: Sequence[tuple[tuple[str, ...], str]] = (
    (("down_blocks.", "conv_in.", "time_embedding."), "the UNet of a diffusers folder"),
    (("text_model.", "embeddings.token_embedding.", "encoder.layers."), "a text encoder"),
)
_INPUTS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an image-editing model (InstructPix2Pix)",
}
_ONLY = "Only text-to-image and inpainting checkpoints of Stable Diffusion v1 and v2 are served"


def family_of(shapes: Shapes, where: str) -> Family:
    """The family of a whole checkpoint that can be served.

    Raises:
        ModelError: it is something else; the message says what, and what to do with it.
    """
    if found := what_else(shapes):
        raise ModelError(f"{where} is {found}")
    has = {part: any(name.startswith(prefix) for name in shapes) for part, prefix in _PREFIXES.items()}
    if not has["UNet"]:
        names = ", ".join(sorted(shapes)[:3]) or "none"
        raise ModelError(f"{where} is not a Stable Diffusion checkpoint: its tensors are {names}, … {_ONLY}")
    channels = shapes[CONV_IN][1] if CONV_IN in shapes else None
    if channels not in (LATENT_CHANNELS, INPAINTING_CHANNELS):
        kind = _INPUTS.get(channels or 0, "another kind of model")
        raise ModelError(f"{where} is {kind}: its UNet takes {channels} channels, expected {LATENT_CHANNELS}. {_ONLY}")
    if missing := [part for part, is_there in has.items() if not is_there]:
        raise ModelError(f"{where} has a UNet but no {' and no '.join(missing)}. Give a checkpoint with all three parts")
    return "v2" if any(name.startswith(OPEN_CLIP) for name in shapes) else "v1"


def what_else(shapes: Shapes) -> str | None:
    """What the file is if it is no checkpoint of the layout of Stable Diffusion v1 and v2, and what to do; None otherwise."""
    if any(_LORA.search(name) for name in shapes):
        return (
            "a LoRA: a small change to a model, not a model. Give the model it is for, and --lora NAME=FILE; requests then name"
            " it with a scale"
        )
    if is_embedding(shapes):
        return "an embedding of textual inversion, not a model. Give the model it is for, and --embedding TOKEN=FILE"
    for prefixes, what in _MODELS:
        if any(name.startswith(prefixes) for name in shapes):
            return f"{what}. {_ONLY}"
    if is_vae(shapes):
        return "a VAE alone. Give the model it is for, and --vae FILE"
    if not any(name.startswith(UNET) for name in shapes):
        for prefixes, what in _PARTS:
            if any(name.startswith(prefixes) for name in shapes):
                return f"{what} alone. Give the folder that holds model_index.json, or a checkpoint with all parts"
    return None


def is_vae(shapes: Shapes) -> bool:
    """In the original layout, with or without its prefix, or in that of diffusers; no other part beside it."""
    bare = [name.removeprefix(VAE) for name in shapes]
    needed = ("decoder.conv_in.weight", "decoder.conv_out.weight")
    return all(name in bare for name in needed) and not any(name.startswith((UNET, TEXT_ENCODER)) for name in shapes)


def is_embedding(shapes: Shapes) -> bool:
    """One vector, or a few; in the form of diffusers, AUTOMATIC1111 or Stable Diffusion XL's pairs."""
    if {"emb_params", "clip_l", "clip_g"} & set(shapes) or any(name.startswith("string_to_param") for name in shapes):
        return True
    return len(shapes) == 1 and all(len(shape) in (1, 2) and shape[-1] >= 2 for shape in shapes.values())

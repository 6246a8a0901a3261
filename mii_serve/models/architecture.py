"""Is this the shape of a Stable Diffusion v1 model? Judged by the parts' configurations alone.

Missing keys mean what they mean to diffusers and transformers: their classes' defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mii_serve.errors import ModelError
from mii_serve.types import LATENT_SCALE

LATENT_CHANNELS = 4
INPAINTING_CHANNELS = LATENT_CHANNELS + 1 + LATENT_CHANNELS
"""Latents, a mask, and the latents of what it leaves of an image: the input of an inpainting model's UNet."""

_UNSUPPORTED_INPUTS = {
    "class_embed_type": "class labels",
    "num_class_embeds": "class labels",
    "addition_embed_type": "additional embeddings (as in SDXL)",
    "encoder_hid_dim_type": "image or projected prompt embeddings (as in IP-Adapter)",
}


def check_architecture(configs: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Refuse what would need other inputs or another latent size than Stable Diffusion v1.

    Raises:
        ModelError
    """
    unet, vae, text_encoder = configs["unet"], configs["vae"], configs["text_encoder"]
    problem = _unet_problem(unet) or _vae_problem(vae) or _embedding_problem(unet, text_encoder)
    if problem:
        raise ModelError(f"{where} is not shaped like Stable Diffusion v1: {problem}. Choose a v1.x text-to-image model")


def check_vae(vae: Mapping[str, Any], where: str) -> None:
    """
    Raises:
        ModelError: its latents are not those of Stable Diffusion v1 and v2.
    """
    if problem := _vae_problem(vae):
        raise ModelError(f"{where} is not a VAE of Stable Diffusion v1 or v2: {problem}")


def _unet_problem(unet: Mapping[str, Any]) -> str | None:
    in_channels = unet.get("in_channels", 4)
    if in_channels not in (LATENT_CHANNELS, INPAINTING_CHANNELS):
        return f"unet in_channels is {in_channels}, expected {LATENT_CHANNELS}, or {INPAINTING_CHANNELS} of an inpainting model"
    if unet.get("out_channels", 4) != LATENT_CHANNELS:
        return f"unet out_channels is {unet['out_channels']}, expected {LATENT_CHANNELS}"
    for key, meaning in _UNSUPPORTED_INPUTS.items():
        if unet.get(key) is not None:
            return f"unet {key} is {unet[key]!r}: it needs {meaning}"
    return None


def _vae_problem(vae: Mapping[str, Any]) -> str | None:
    blocks = vae.get("decoder_block_out_channels") or vae.get("block_out_channels", (64,))  # the first of an AutoencoderTiny
    scale = 2 ** (len(blocks) - 1) if isinstance(blocks, list | tuple) else None
    if scale != LATENT_SCALE:
        return f"vae scale factor is {scale} (block_out_channels {blocks}), expected {LATENT_SCALE}"
    if vae.get("latent_channels", 4) != LATENT_CHANNELS:
        return f"vae latent_channels is {vae['latent_channels']}, expected {LATENT_CHANNELS}"
    return None


def _embedding_problem(unet: Mapping[str, Any], text_encoder: Mapping[str, Any]) -> str | None:
    wanted = unet.get("cross_attention_dim", 1280)
    width = text_encoder.get("hidden_size", 512)
    widths = wanted if isinstance(wanted, list | tuple) else [wanted]
    if any(each != width for each in widths):
        return f"unet cross_attention_dim is {wanted} but text_encoder hidden_size is {width}"
    return None

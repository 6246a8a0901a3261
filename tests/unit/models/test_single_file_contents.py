"""What a file of weights is, is told by the names and shapes of its tensors."""

from __future__ import annotations

import pytest

from mii_serve.errors import ModelError
from mii_serve.models.single_file.contents import Shapes, family_of

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CHECKPOINT = {
    f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
    f"{UNET}middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
    f"{VAE}decoder.conv_in.weight": (512, 4, 3, 3),
    f"{VAE}decoder.conv_out.weight": (3, 128, 3, 3),
    "model_ema.decay": (),
    "alphas_cumprod": (1000,),
}
V1 = {**CHECKPOINT, "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768)}
V2 = {**CHECKPOINT, "cond_stage_model.model.token_embedding.weight": (49408, 1024)}


def unet_of(channels: int) -> Shapes:
    return {**V1, f"{UNET}input_blocks.0.0.weight": (320, channels, 3, 3)}


def test_a_checkpoint_is_of_v1_or_v2() -> None:
    assert (family_of(V1, "x"), family_of(V2, "x")) == ("v1", "v2")


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (unet_of(8), "InstructPix2Pix"),
        (unet_of(5), "depth-to-image"),
        (unet_of(6), "another kind of model: its UNet takes 6 channels"),
        ({**V1, f"{UNET}label_emb.0.0.weight": (1280, 2816)}, "a Stable Diffusion XL checkpoint"),
        ({"conditioner.embedders.0.transformer.x": (1,), **CHECKPOINT}, "a Stable Diffusion XL checkpoint"),
        ({f"{UNET}double_blocks.0.img_attn.qkv.weight": (1, 1)}, "a diffusion transformer"),
        ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "a ControlNet"),
        (CHECKPOINT, "has a UNet but no text encoder"),
        ({name: s for name, s in V1.items() if not name.startswith(VAE)}, "has a UNet but no VAE"),
        ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320)}, "a LoRA"),
        ({"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": (4, 320)}, "a LoRA"),
        ({"unet.mid_block.attentions.0.processor.to_q_lora.up.weight": (4, 320)}, "a LoRA"),
        ({"<cat-toy>": (768,)}, "an embedding of textual inversion"),
        ({"emb_params": (8, 768)}, "an embedding of textual inversion"),
        ({"string_to_param.*": (8, 768)}, "an embedding of textual inversion"),
        ({"encoder.conv_in.weight": (1,), "decoder.conv_in.weight": (1,), "decoder.conv_out.weight": (1,)}, "a VAE alone"),
        ({"down_blocks.0.resnets.0.conv1.weight": (1,), "conv_in.weight": (1,)}, "the UNet of a diffusers folder alone"),
        ({"text_model.encoder.layers.0.mlp.fc1.bias": (1,), "text_model.x": (1,)}, "a text encoder alone"),
        ({"a": (1, 2, 3), "b": (1,)}, "not a Stable Diffusion checkpoint: its tensors are a, b"),
        ({}, "its tensors are none"),
    ],
)
def test_everything_else_is_named(shapes: Shapes, told: str) -> None:
    with pytest.raises(ModelError) as refused:
        family_of(shapes, "/models/x.safetensors")
    assert str(refused.value).startswith("/models/x.safetensors ")
    assert told in str(refused.value)

"""Each saving of `NativeKernels`, and of `FusedKernels`, changes nothing: compared with `UNet2DConditionModel.forward`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from mii_serve.engine.kernels.fused.forward import FusedKernels, why_not_fusible
from mii_serve.engine.kernels.fused.operations import TorchOperations
from mii_serve.engine.kernels.native import NEUTRAL_OPTIONS, NativeKernels, why_unsupported

TOLERANCE = 2e-6
"""Relative to the largest value; float32 rounds at 6e-8 and some thirty layers follow each other."""

V1 = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SHAPES: dict[str, dict[str, Any]] = {
    "v1": V1,
    "linear projection": {**V1, "use_linear_projection": True},
    "two transformers a block": {**V1, "transformer_layers_per_block": 2, "layers_per_block": 1},
    "attention only below": {
        **V1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32),
    },
    "no middle": {  # as in tiny-sd and bk-sdm
        **V1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "mid_block_type": None,
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
    },
}
TIMES = torch.tensor([999.0, 1.0, 340.5])
SAMPLE_OF_ROW = torch.tensor([0, 1, 2, 0, 2])


def make_unet(**config: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=8, **config).eval().requires_grad_(False)


@pytest.fixture(params=SHAPES)
def unet(request):
    return make_unet(**SHAPES[request.param])


def inputs(unet: UNet2DConditionModel, size: tuple[int, int] = (8, 8)) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of three samples, and the embedded prompts of their five rows."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 4, *size, generator=generator)
    return latents, torch.randn(len(SAMPLE_OF_ROW), 11, unet.config.cross_attention_dim, generator=generator)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * theirs.abs().max().item())


def fused(unet: UNet2DConditionModel) -> FusedKernels:
    """With torch's operations in the place of the Triton kernels."""
    assert why_not_fusible(unet) is None
    return FusedKernels(unet.to(memory_format=torch.channels_last), TorchOperations())


each_set = pytest.mark.parametrize("kernels", [NativeKernels, fused], ids=["native", "fused"])


@each_set
@pytest.mark.parametrize("size", [(8, 8), (12, 8), (9, 7)], ids=str)
def test_all_savings_together(unet, size, kernels):
    latents, embeds = inputs(unet, size)
    ours = kernels(unet)
    latents = latents.contiguous(memory_format=torch.channels_last)
    made = ours.predict_noise(latents, ours.embed_timesteps(TIMES), ours.project_prompts(embeds), SAMPLE_OF_ROW)
    assert_close(made, unet(latents[SAMPLE_OF_ROW], TIMES[SAMPLE_OF_ROW], encoder_hidden_states=embeds).sample)


@each_set
def test_without_a_pair_nothing_is_shared(unet, kernels):
    latents, embeds = inputs(unet)
    ours = kernels(unet)
    latents = latents.contiguous(memory_format=torch.channels_last)
    made = ours.predict_noise(latents, ours.embed_timesteps(TIMES), ours.project_prompts(embeds[:3]))
    assert_close(made, unet(latents, TIMES, encoder_hidden_states=embeds[:3]).sample)


def test_the_shared_prefix_changes_nothing(unet):
    """Alone: the same call with and without it."""
    latents, embeds = inputs(unet)
    ours = NativeKernels(unet)
    time, key_values = ours.embed_timesteps(TIMES), ours.project_prompts(embeds)
    apart = ours.predict_noise(latents[SAMPLE_OF_ROW], time[SAMPLE_OF_ROW], key_values)
    assert_close(ours.predict_noise(latents, time, key_values, SAMPLE_OF_ROW), apart)


def test_time_projections_are_those_of_the_resnets(unet):
    """Alone: what hooks see diffusers project."""
    seen: dict[Any, torch.Tensor] = {}
    ours = NativeKernels(unet)
    for resnet in ours._resnets:
        resnet.time_emb_proj.register_forward_hook(lambda _, __, out, key=resnet: seen.__setitem__(key, out))
    latents, embeds = inputs(unet)
    unet(latents, TIMES, encoder_hidden_states=embeds[:3])
    theirs = dict(seen)
    packed = ours.embed_timesteps(TIMES)
    assert packed.shape == (3, ours.timestep_width) and len(theirs) == len(ours._resnets) > 4
    for resnet, projection in theirs.items():
        assert_close(packed[:, ours.time_of(resnet)], projection)


def test_keys_and_values_are_those_of_the_cross_attentions(unet):
    """Alone: what hooks see diffusers project."""
    seen: dict[Any, torch.Tensor] = {}
    ours = NativeKernels(unet)
    for attention in ours._cross:
        attention.to_k.register_forward_hook(lambda _, __, out, key=attention: seen.__setitem__((key, "keys"), out))
        attention.to_v.register_forward_hook(lambda _, __, out, key=attention: seen.__setitem__((key, "values"), out))
    latents, embeds = inputs(unet)
    unet(latents, TIMES, encoder_hidden_states=embeds[:3])
    theirs = dict(seen)
    packed = ours.project_prompts(embeds[:3])
    assert packed.shape == (3, 11, ours.prompt_width) and len(theirs) == 2 * len(ours._cross)
    for attention in ours._cross:
        assert_close(packed[..., ours.keys_of(attention)], theirs[attention, "keys"])
        assert_close(packed[..., ours.values_of(attention)], theirs[attention, "values"])


def test_channels_last_stays_channels_last():
    unet = make_unet(**V1).to(memory_format=torch.channels_last)
    latents, embeds = inputs(unet)
    ours = NativeKernels(unet)
    latents = latents.contiguous(memory_format=torch.channels_last)
    formats = []
    for resnet in ours._resnets:
        resnet.conv2.register_forward_hook(
            lambda _, __, out: formats.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    made = ours.predict_noise(latents, ours.embed_timesteps(TIMES), ours.project_prompts(embeds), SAMPLE_OF_ROW)
    assert all(formats) and len(formats) == len(ours._resnets)
    assert_close(made, unet(latents[SAMPLE_OF_ROW], TIMES[SAMPLE_OF_ROW], encoder_hidden_states=embeds).sample)


def test_division_by_one_is_the_only_division_left_out():
    unet = make_unet(**V1)
    assert {m.output_scale_factor for m in NativeKernels(unet)._resnets} == {1.0}
    assert {m.rescale_output_factor for m in NativeKernels(unet)._cross} == {1.0}
    assert "resnet_out_scale_factor" in NEUTRAL_OPTIONS and "mid_block_scale_factor" in NEUTRAL_OPTIONS


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift='scale_shift'"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"mid_block_scale_factor": 2.0}, "mid_block_scale_factor=2.0"),
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")}, "a block of type AttnDownBlock2D"),
    ],
)
def test_what_it_does_not_support_is_named(config, named):
    assert why_unsupported(make_unet(**{**V1, **config})) == named
    assert why_unsupported(make_unet(**V1)) is None


def test_foreign_attention_processors_are_not_supported():
    unet = make_unet(**V1)
    unet.set_attn_processor(AttnProcessor())
    assert why_unsupported(unet) == "an attention processor of type AttnProcessor"

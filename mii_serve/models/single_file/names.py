"""Which tensor of the original layout becomes which tensor of diffusers and transformers. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from mii_serve.models.single_file.contents import CLIP, OPEN_CLIP, UNET, VAE

_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_VAE_SHORTCUT = {"nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OPEN_CLIP_ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_UNET_NAME = re.compile(r"(?P<side>input_blocks|output_blocks)\.(?P<block>\d+)\.(?P<index>\d+)\.(?P<rest>.+)")
_MIDDLE_NAME = re.compile(r"middle_block\.(?P<index>[012])\.(?P<rest>.+)")
_VAE_LEVEL = re.compile(r"(?P<side>encoder|decoder)\.(down|up)\.(?P<level>\d+)\.(?P<rest>.+)")
_VAE_MIDDLE = re.compile(r"(?P<side>encoder|decoder)\.mid\.(?P<kind>block|attn)_(?P<number>\d)\.(?P<rest>.+)")
_OPEN_CLIP_NAME = re.compile(r"transformer\.resblocks\.(?P<layer>\d+)\.(?P<rest>.+)")


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the file. Of three tensors in one, `third` says which; a 1 × 1 convolution that is now a linear layer loses
    its last dimensions (`is_flattened`)."""

    name: str
    third: int | None = None
    is_flattened: bool = False


Sources = Mapping[str, Source]
"""By the name of the tensor in diffusers; without the prefix `text_model.` that only some releases of transformers have."""


def unet_sources(names: Iterable[str], *, layers_per_block: int) -> Sources:
    return _sources(names, UNET, lambda name: _unet_name(name, layers_per_block + 1))


def vae_sources(names: Iterable[str], *, num_levels: int, prefix: str = VAE) -> Sources:
    found = {}
    for target, source in _sources(names, prefix, lambda name: _vae_name(name, num_levels)).items():
        is_linear = ".attentions." in target and target.endswith(".weight") and ".group_norm." not in target
        found[target] = Source(source.name, is_flattened=is_linear)
    return found


def clip_sources(names: Iterable[str]) -> Sources:
    return _sources(names, CLIP, lambda name: name.removeprefix("text_model."))


def open_clip_sources(names: Iterable[str], *, num_layers: int) -> Sources:
    """Of the first layers alone: Stable Diffusion v2 uses the output of the last but one."""
    found: dict[str, Source] = {}
    for name in names:
        inner = name.removeprefix(OPEN_CLIP)
        if inner == name:
            continue
        if inner in _OPEN_CLIP_ENDS:
            found[_OPEN_CLIP_ENDS[inner]] = Source(name)
        elif (match := _OPEN_CLIP_NAME.fullmatch(inner)) and int(match["layer"]) < num_layers:
            layer, rest = f"encoder.layers.{match['layer']}", match["rest"]
            if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
                leaf = rest.removeprefix("attn.in_proj_")
                for third, projection in enumerate(("q_proj", "k_proj", "v_proj")):
                    found[f"{layer}.self_attn.{projection}.{leaf}"] = Source(name, third=third)
            else:
                found[f"{layer}.{_renamed(rest, _OPEN_CLIP_LAYER)}"] = Source(name)
    return found


def _sources(names: Iterable[str], prefix: str, rename: Callable[[str], str | None]) -> dict[str, Source]:
    found = {}
    for name in names:
        if name.startswith(prefix) and (target := rename(name.removeprefix(prefix))) is not None:
            found[target] = Source(name)
    return found


def _unet_name(name: str, per_level: int) -> str | None:
    """None for what is no part of the UNet's blocks. A level is `per_level` blocks, the last of which changes the size."""
    stem, _, leaf = name.rpartition(".")
    if stem in _UNET_ENDS:
        return f"{_UNET_ENDS[stem]}.{leaf}"
    if match := _MIDDLE_NAME.fullmatch(name):
        index = int(match["index"])
        if index == 1:
            return f"mid_block.attentions.0.{match['rest']}"
        return f"mid_block.resnets.{index // 2}.{_renamed(match['rest'], _RESNET)}"
    if (match := _UNET_NAME.fullmatch(name)) is None:
        return None
    is_down = match["side"] == "input_blocks"
    block, index, rest = int(match["block"]) - is_down, int(match["index"]), match["rest"]
    level = f"{'down' if is_down else 'up'}_blocks.{block // per_level}"
    if index == 0 and rest.startswith("op."):
        return f"{level}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    if index > 0 and rest.startswith("conv."):
        return f"{level}.upsamplers.0.{rest}"
    if index == 1:
        return f"{level}.attentions.{block % per_level}.{rest}"
    return f"{level}.resnets.{block % per_level}.{_renamed(rest, _RESNET)}" if index == 0 else None


def _vae_name(name: str, num_levels: int) -> str | None:
    if name.startswith(("quant_conv.", "post_quant_conv.", "encoder.conv_", "decoder.conv_")):
        return name
    if ".norm_out." in name:
        return name.replace(".norm_out.", ".conv_norm_out.")
    if match := _VAE_MIDDLE.fullmatch(name):
        middle = f"{match['side']}.mid_block"
        if match["kind"] == "attn":
            return f"{middle}.attentions.0.{_renamed(match['rest'], _VAE_ATTENTION)}"
        return f"{middle}.resnets.{int(match['number']) - 1}.{_renamed(match['rest'], _VAE_SHORTCUT)}"
    if (match := _VAE_LEVEL.fullmatch(name)) is None:
        return None
    level, rest = int(match["level"]), match["rest"]
    is_down = match["side"] == "encoder"
    place = f"encoder.down_blocks.{level}" if is_down else f"decoder.up_blocks.{num_levels - 1 - level}"
    kind, _, inner = rest.partition(".")
    if kind == "block":
        number, _, inner = inner.partition(".")
        return f"{place}.resnets.{number}.{_renamed(inner, _VAE_SHORTCUT)}"
    return f"{place}.{kind}rs.0.{inner}" if kind in ("downsample", "upsample") else None


def _renamed(rest: str, table: Mapping[str, str]) -> str:
    """The name with its layer, all but the last word, replaced where the table has it."""
    stem, _, leaf = rest.rpartition(".")
    return f"{table.get(stem, stem)}.{leaf}"

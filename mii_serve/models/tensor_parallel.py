"""A UNet under tensor parallelism: how many ranks can share it, which part of each tensor a rank holds, and loading that part.

The cuts are those of Megatron-LM: in a transformer block, queries, keys and values by heads, and the feed-forward part by its
inner channels; in a residual block, the channels between its two convolutions, on the boundaries of the groups of its second
norm. A layer that makes those channels is cut by its outputs, the layer that takes them in by its inputs, so that its results
are partial sums: their addition over the ranks is up to the kernel set (`engine/kernels/sharded.py`). All else is whole on
every rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from safetensors import safe_open
from torch import nn

from mii_serve.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorShard:
    """The part of every cut tensor that rank `rank` of `world_size` holds."""

    rank: int
    world_size: int


@dataclass(frozen=True, slots=True)
class Cut:
    """How a tensor is divided along `dim`, in which `num_parts` tensors of equal size follow each other, each divided alone."""

    dim: int
    num_parts: int = 1

    def take(self, tensor: Any, size: int, shard: TensorShard) -> torch.Tensor:
        """A rank's part of a tensor, or of what reads slices of one, of which `size` is the size along `dim`."""
        part, share = size // self.num_parts, size // self.num_parts // shard.world_size
        starts = [index * part + shard.rank * share for index in range(self.num_parts)]
        taken = [tensor[(*[slice(None)] * self.dim, slice(start, start + share))] for start in starts]
        return taken[0] if len(taken) == 1 else torch.cat(taken, self.dim)


_CUTS: Sequence[tuple[re.Pattern[str], Cut]] = [
    (re.compile(pattern), cut)
    for pattern, cut in (
        (r"\.attn[12]\.to_[qkv]\.(weight|bias)$", Cut(0)),
        (r"\.attn[12]\.to_out\.0\.weight$", Cut(1)),
        (r"\.ff\.net\.0\.proj\.(weight|bias)$", Cut(0, num_parts=2)),  # GEGLU: the values, then their gates
        (r"\.ff\.net\.2\.weight$", Cut(1)),
        (r"\.resnets\.\d+\.(conv1|time_emb_proj|norm2)\.(weight|bias)$", Cut(0)),
        (r"\.resnets\.\d+\.conv2\.weight$", Cut(1)),
    )
]


def cut_of(name: str) -> Cut | None:
    """How the tensor of this name in a `UNet2DConditionModel` is divided; None if every rank holds all of it."""
    return next((cut for pattern, cut in _CUTS if pattern.search(name)), None)


def possible_sizes(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The numbers of ranks, from 2, that can share a UNet of this configuration: they divide its heads, groups and channels."""
    common = math.gcd(*_heads(config), config.get("norm_num_groups", 32), *_channels(config))
    return tuple(size for size in range(2, common + 1) if common % size == 0)


def check_size(config: Mapping[str, Any], world_size: int) -> None:
    """Refuse a number of ranks that cannot share a UNet of this configuration.

    Raises:
        ConfigError: it names those that can.
    """
    sizes = possible_sizes(config)
    if world_size == 1 or world_size in sizes:
        return
    heads, channels = (_listed(sorted(set(each)), "and") for each in (_heads(config), _channels(config)))
    unet = f"a UNet of {heads} attention heads, {config.get('norm_num_groups', 32)} norm groups and {channels} channels"
    can = f"can be sharded over {_listed(sizes, 'or')} ranks" if sizes else "cannot be sharded"
    raise ConfigError("tensor_parallel", f"{unet} {can}, got {world_size}; the parallelism 'rows' takes any number")


def cut_state_dict(tensors: Mapping[str, torch.Tensor], shard: TensorShard) -> dict[str, torch.Tensor]:
    """A rank's part of a UNet's tensors, in memory of its own."""
    return {name: _take(tensor, name, tensor.shape, shard).clone() for name, tensor in tensors.items()}


def keep_shard(unet: Any, shard: TensorShard) -> None:
    """Reduce a loaded `UNet2DConditionModel` to a rank's part of it, in place, tensor by tensor.

    Raises:
        ConfigError: so many ranks cannot share it.
    """
    check_size(unet.config, shard.world_size)

    def part(name: str) -> torch.Tensor:
        whole = unet.get_parameter(name)
        return _take(whole, name, whole.shape, shard).detach().clone()

    _replace(unet, [name for name, _ in unet.named_parameters()], part, shard)


def load_shard(
    folder: Path, files: Sequence[Path], *, shard: TensorShard, dtype: torch.dtype, device: torch.device
) -> tuple[Any, dict[str, list[str]]]:
    """A UNet reduced to a rank's part, of which nothing else is read from the safetensors `files`.

    With it, as from diffusers' `from_pretrained`, the names of its tensors that are missing in the files (`missing_keys`: the
    UNet cannot be used) and of those in the files that it does not have (`unexpected_keys`).

    Raises:
        ConfigError: so many ranks cannot share it.
        ValueError: a tensor in the files has another shape than the UNet's.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(folder), local_files_only=True))
    check_size(unet.config, shard.world_size)
    shapes = {name: list(parameter.shape) for name, parameter in unet.named_parameters()}
    with ExitStack() as opened:
        stored = {}
        for file in files:
            content = opened.enter_context(safe_open(file, framework="pt"))
            stored.update(dict.fromkeys(content.keys(), content))

        def part(name: str) -> torch.Tensor:
            tensor = stored[name].get_slice(name)
            if (shape := tensor.get_shape()) != shapes[name]:
                raise ValueError(f"{name} has the shape {shape}, and the UNet's is {shapes[name]}")
            return _take(tensor, name, shape, shard).to(device=device, dtype=dtype, copy=True)

        _replace(unet, [name for name in shapes if name in stored], part, shard)
    return unet, {
        "missing_keys": [name for name in shapes if name not in stored],
        "unexpected_keys": [name for name in stored if name not in shapes],
    }


def _take(tensor: Any, name: str, shape: Sequence[int], shard: TensorShard) -> torch.Tensor:
    cut = cut_of(name)
    return tensor[:] if cut is None else cut.take(tensor, shape[cut.dim], shard)


def _replace(unet: Any, names: Sequence[str], part: Callable[[str], torch.Tensor], shard: TensorShard) -> None:
    """Put `part(name)` into the place of each tensor, and correct the sizes that modules remember of theirs."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(unet.get_submodule(owner), leaf, nn.Parameter(part(name), requires_grad=False))
    for module in unet.modules():
        match module:
            case nn.Linear():
                module.out_features, module.in_features = module.weight.shape
            case nn.Conv2d():
                module.out_channels, module.in_channels = module.weight.shape[:2]
            case nn.GroupNorm() if module.num_channels != len(module.weight):
                module.num_groups, module.num_channels = module.num_groups // shard.world_size, len(module.weight)
            case Attention():
                module.heads //= shard.world_size


def _listed(numbers: Sequence[int], word: str) -> str:
    *before, last = map(str, numbers)
    return f"{', '.join(before)} {word} {last}" if before else last


def _channels(config: Mapping[str, Any]) -> Sequence[int]:
    return config.get("block_out_channels", (320, 640, 1280, 1280))


def _heads(config: Mapping[str, Any]) -> list[int]:
    """Of every block; diffusers' `attention_head_dim` has always been their number."""
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    return [heads] if isinstance(heads, int) else list(heads)

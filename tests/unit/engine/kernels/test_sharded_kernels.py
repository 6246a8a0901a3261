"""One rank of a sharded UNet, without the others: what it sums, and what it refuses. Exactness is in tests/numeric."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from rank_groups import LoneRank

from mii_serve.engine.kernels.native import NativeKernels
from mii_serve.engine.kernels.sharded import ShardedKernels
from mii_serve.engine.kernels.sharded_traffic import traffic_of_call
from mii_serve.errors import EngineError
from mii_serve.models.families import SD_V1_4
from mii_serve.models.tensor_parallel import TensorShard, keep_shard

SMALL = {**SD_V1_4.unet, "block_out_channels": [64, 64, 96, 96], "cross_attention_dim": 24}
SHAPES: dict[str, dict[str, Any]] = {
    "v1": SMALL,
    "attention only below": {
        **SMALL,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [64, 96],
    },
    "other numbers of layers": {**SMALL, "layers_per_block": [1, 2, 1, 3], "transformer_layers_per_block": [1, 2, 1, 1]},
}


def meta_unet(**config: Any) -> UNet2DConditionModel:
    """Shapes without memory."""
    with torch.device("meta"):
        return UNet2DConditionModel(**config).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("shape", "num_samples", "num_rows", "size"),
    [("v1", 3, 5, (9, 14)), ("attention only below", 1, 2, (16, 16)), ("other numbers of layers", 2, 2, (8, 8))],
    ids=["mixed, odd size", "guided", "unguided"],
)
def test_the_formula_gives_the_all_reduces_and_bytes_of_a_call(shape, num_samples, num_rows, size):
    config = SHAPES[shape]
    unet = meta_unet(**config)
    keep_shard(unet, TensorShard(rank=1, world_size=2))
    group = LoneRank(1, 2)
    kernels = ShardedKernels(unet, group)
    with torch.device("meta"):
        kernels.predict_noise(
            torch.empty(num_samples, 4, *size),
            torch.empty(num_samples, kernels.timestep_width),
            torch.empty(num_rows, 7, kernels.prompt_width),
            torch.empty(num_rows, dtype=torch.int64) if num_rows > num_samples else None,
        )
    height, width = size
    formula = traffic_of_call(config, num_samples=num_samples, num_rows=num_rows, height=height, width=width, bytes_per_value=4)
    assert (formula.num_all_reduces, formula.num_bytes) == (len(group.sent), sum(group.sent))


def test_the_traffic_of_stable_diffusion_v1_4_in_half_precision():
    one = traffic_of_call(SD_V1_4.unet, num_samples=1, num_rows=2, height=64, width=64, bytes_per_value=2)
    assert (one.num_all_reduces, round(one.num_bytes / 1e6, 1)) == (70, 181.5)
    eight = traffic_of_call(SD_V1_4.unet, num_samples=8, num_rows=16, height=64, width=64, bytes_per_value=2)
    assert (eight.num_all_reduces, eight.num_bytes) == (70, 8 * one.num_bytes)


def test_what_is_kept_of_prompts_and_timesteps_is_the_ranks_part():
    whole = NativeKernels(meta_unet(**SMALL))
    unet = meta_unet(**SMALL)
    keep_shard(unet, TensorShard(rank=0, world_size=4))
    kernels = ShardedKernels(unet, LoneRank(0, 4))
    assert 4 * kernels.prompt_width == whole.prompt_width
    assert 4 * kernels.timestep_width == whole.timestep_width


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_unet_that_is_not_the_groups_shard_is_refused(world_size):
    unet = meta_unet(**SMALL)
    keep_shard(unet, TensorShard(rank=0, world_size=2))
    if world_size == 2:
        ShardedKernels(unet, LoneRank(0, 2))
    else:
        with pytest.raises(EngineError, match=f"not sharded over {world_size} ranks"):
            ShardedKernels(unet, LoneRank(0, world_size))

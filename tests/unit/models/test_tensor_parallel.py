"""Which numbers of ranks can share a UNet, and which part of it each of them gets."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from mii_serve.errors import ConfigError
from mii_serve.models.families import SD_V1_4
from mii_serve.models.source import DEMO_FOLDER
from mii_serve.models.tensor_parallel import (
    TensorShard,
    check_size,
    cut_of,
    cut_state_dict,
    keep_shard,
    possible_sizes,
)

SMALL: dict[str, Any] = {
    **SD_V1_4.unet,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
DEMO = json.loads((DEMO_FOLDER / "unet" / "config.json").read_text())


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return UNet2DConditionModel(**SMALL).requires_grad_(False).state_dict()


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (SD_V1_4.unet, (2, 4, 8)),
        ({}, (2, 4, 8)),
        (DEMO, (2, 4)),
        ({**SD_V1_4.unet, "norm_num_groups": 2}, (2,)),
        ({**SD_V1_4.unet, "attention_head_dim": 6, "norm_num_groups": 32}, (2,)),
        ({**SD_V1_4.unet, "attention_head_dim": [5, 10, 20, 20]}, ()),
        ({**SD_V1_4.unet, "attention_head_dim": 40, "num_attention_heads": [4, 4, 8, 8]}, (2, 4)),
        ({**SD_V1_4.unet, "attention_head_dim": 3, "norm_num_groups": 3, "block_out_channels": [96, 192]}, (3,)),
    ],
    ids=["v1-4", "diffusers' defaults", "demo", "few groups", "six heads", "v2's heads", "heads by block", "three"],
)
def test_the_possible_numbers_of_ranks(config, sizes):
    assert possible_sizes(config) == sizes


def test_another_number_is_refused_with_those_that_are_possible():
    for size in (1, 2, 4, 8):
        check_size(SD_V1_4.unet, size)
    with pytest.raises(ConfigError) as refused:
        check_size(SD_V1_4.unet, 3)
    assert refused.value.setting == "tensor_parallel"
    assert str(refused.value) == (
        "tensor_parallel: a UNet of 8 attention heads, 32 norm groups and 320, 640 and 1280 channels can be sharded over"
        " 2, 4 or 8 ranks, got 3; the parallelism 'rows' takes any number"
    )
    with pytest.raises(ConfigError, match="cannot be sharded, got 2"):
        check_size({**SD_V1_4.unet, "attention_head_dim": 1}, 2)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_parts_of_all_ranks_are_the_tensor(tensors, world_size):
    parts = [cut_state_dict(tensors, TensorShard(rank=rank, world_size=world_size)) for rank in range(world_size)]
    num_cut = 0
    for name, whole in tensors.items():
        if (cut := cut_of(name)) is None:
            assert all(torch.equal(part[name], whole) for part in parts)
            continue
        num_cut += 1
        split = [part[name].chunk(cut.num_parts, cut.dim) for part in parts]
        in_order = [rank[index] for index in range(cut.num_parts) for rank in split]
        assert torch.equal(torch.cat(in_order, cut.dim), whole), name
    assert num_cut == 8 * 7 + 4 * 11, "of 8 residual blocks and 4 transformer blocks"


def test_a_rank_keeps_nothing_of_the_others_parts(tensors):
    """Neither in its modules nor in memory behind them."""
    unet = UNet2DConditionModel(**SMALL).requires_grad_(False)
    unet.load_state_dict(tensors)
    shard = TensorShard(rank=3, world_size=4)
    keep_shard(unet, shard)
    expected = cut_state_dict(tensors, shard)
    assert unet.state_dict().keys() == expected.keys()
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, expected[name])
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    assert (block.attn1.heads, block.attn1.to_q.out_features, block.attn1.to_out[0].in_features) == (1, 4, 4)
    assert (block.ff.net[0].proj.out_features, block.ff.net[2].in_features) == (32, 16)
    resnet = unet.down_blocks[1].resnets[0]
    assert (resnet.conv1.in_channels, resnet.conv1.out_channels) == (16, 8)
    assert (resnet.conv2.in_channels, resnet.conv2.out_channels) == (8, 32)
    assert (resnet.norm1.num_groups, resnet.norm2.num_groups, resnet.norm2.num_channels) == (8, 2, 8)
    assert resnet.time_emb_proj.out_features == 8


def test_a_number_of_ranks_that_is_not_possible_changes_nothing(tensors):
    unet = UNet2DConditionModel(**SMALL).requires_grad_(False)
    unet.load_state_dict(tensors)
    with pytest.raises(ConfigError, match="2 or 4 ranks, got 3"):
        keep_shard(unet, TensorShard(rank=0, world_size=3))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in unet.state_dict().items())

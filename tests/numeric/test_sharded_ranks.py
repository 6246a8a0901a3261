"""A UNet sharded over processes predicts what the whole one predicts, on every rank the same bits.

Each of four processes does all its work at once, as its start is what takes the time; the first two are a group of two as well.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import sharded_ranks
import torch
from diffusers import UNet2DConditionModel
from drawing import draw_batch, most_different
from rank_groups import LoneRank, run_ranks
from sharded_ranks import DTYPES, MODEL_INPUT_SHAPE, REQUESTS, SAMPLE_OF_ROW, SIZES

from mii_serve.engine.factory import native_engine
from mii_serve.engine.kernels.native import NativeKernels
from mii_serve.engine.kernels.sharded import ShardedKernels
from mii_serve.engine.kernels.sharded_traffic import traffic_of_call
from mii_serve.models.families import SD_V1_4
from mii_serve.models.tensor_parallel import TensorShard, keep_shard

TOLERANCE = 5e-6
"""In float32, relative to the largest value. It rounds at 6e-8; sums over channels and heads are taken in another order, in
some seventy layers that follow each other."""

pytestmark = pytest.mark.slow

each_group = pytest.mark.parametrize(("model", "size"), [(model, size) for model in ("demo", "v1") for size in SIZES])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[Any, Any]]:
    return run_ranks(max(SIZES), sharded_ranks.work, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def unets(demo) -> dict[str, Any]:
    """Whole."""
    unets = {"demo": demo.pipeline.unet, "v1": sharded_ranks.v1_unet()}
    return {model: unet.to(memory_format=torch.channels_last) for model, unet in unets.items()}


@each_group
def test_a_mixed_batch_is_predicted_as_by_the_whole_unet(ranks, unets, model, size):
    with torch.inference_mode():
        expected = sharded_ranks.predict(NativeKernels(unets[model]), unets[model])
    largest = expected.abs().max().item()
    assert largest > 0.1
    torch.testing.assert_close(ranks[0][model, size].prediction, expected, rtol=0, atol=TOLERANCE * largest)


@pytest.mark.parametrize("model", ["v1 in bf16", "v1 in fp16"])
@pytest.mark.parametrize("size", SIZES)
def test_half_precision_costs_a_sharded_unet_what_it_costs_a_whole_one(ranks, unets, model, size):
    """Sums of partial sums are rounded once more."""
    unet = sharded_ranks.v1_unet(DTYPES[model])
    with torch.inference_mode():
        exact, whole = (sharded_ranks.predict(NativeKernels(one), one).float() for one in (unets["v1"], unet))
    sharded = ranks[0][model, size].prediction.float()
    error, error_of_whole = ((made - exact).square().mean().sqrt() for made in (sharded, whole))
    assert 0 < error < 1.2 * error_of_whole


@pytest.mark.parametrize(("model", "size"), [(model, size) for model in ("demo", *DTYPES) for size in SIZES])
def test_all_ranks_have_the_same_bits(ranks, model, size):
    assert all(torch.equal(ranks[0][model, size].prediction, rank[model, size].prediction) for rank in ranks[1:size])


@each_group
def test_a_call_sends_what_the_formula_says(ranks, unets, model, size):
    config = unets[model].config
    num_samples, _, height, width = MODEL_INPUT_SHAPE
    formula = traffic_of_call(
        config,
        num_samples=num_samples,
        num_rows=len(SAMPLE_OF_ROW),
        height=height,
        width=width,
        bytes_per_value=4,
    )
    for rank in ranks[:size]:
        assert (rank[model, size].num_sums, rank[model, size].num_bytes) == dataclasses.astuple(formula)
    if model == "v1":
        assert formula.num_all_reduces == 70


@each_group
def test_a_rank_holds_little_more_than_its_share(ranks, unets, model, size):
    whole = sharded_ranks.num_weights(unets[model])
    for rank in ranks[:size]:
        assert 1 / size < rank[model, size].num_weights / whole < 1 / size + 0.1


@pytest.mark.parametrize("size", SIZES)
def test_pictures_from_the_batched_loop_are_those_of_one_process(ranks, demo, size):
    engine = native_engine(demo, max_slots=4)
    engine.warmup()
    expected = draw_batch(engine, REQUESTS)
    engine.close()
    for rank in ranks[:size]:
        for mine, picture, first in zip(rank["pictures", size], expected, ranks[0]["pictures", size], strict=True):
            assert most_different(mine, picture) <= 1
            assert mine.rgb == first.rgb


@pytest.mark.parametrize(("size", "share"), [(2, 0.56), (4, 0.34), (8, 0.23)])
def test_a_call_of_stable_diffusion_v1_4_as_the_docs_describe_it(size, share):
    """At full size, without memory: shapes alone."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD_V1_4.unet).requires_grad_(False)
        whole = sharded_ranks.num_weights(unet)
        keep_shard(unet, TensorShard(rank=size - 1, world_size=size))
        unet = unet.to(torch.float16)
        group = LoneRank(size - 1, size)
        kernels = ShardedKernels(unet, group)
        embeds = {"timestep_embeds": (1, kernels.timestep_width), "prompts": (2, 77, kernels.prompt_width)}
        kernels.predict_noise(
            torch.empty(1, 4, 64, 64, dtype=torch.float16),
            **{name: torch.empty(shape, dtype=torch.float16) for name, shape in embeds.items()},
            sample_of_row=torch.empty(2, dtype=torch.int64),
        )
    assert sharded_ranks.num_weights(unet) / whole == pytest.approx(share, abs=0.005)
    assert (len(group.sent), round(sum(group.sent) / 1e6, 1)) == (70, 181.5)

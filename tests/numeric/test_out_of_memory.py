"""A UNet call that does not fit is halved until it does; the capacity found is reported, and no picture changes.

The device's refusal is imitated where it comes from: the UNet's first layer raises what torch raises when a call is too large.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mii_serve.engine.batched import BatchedEngine
from mii_serve.engine.batched.buckets import declare_buckets
from mii_serve.engine.factory import native_engine
from mii_serve.engine.kernels.shares import shares
from mii_serve.engine.ranks.group import RankGroup
from mii_serve.errors import EngineError
from mii_serve.types import Picture, RequestedParams, Sample, SampleId, StepPlan

GUIDANCE = (3.0, 1.0, 7.5, 3.0, 1.0)


def draw(engine: BatchedEngine) -> list[Picture]:
    samples = []
    for i, guidance in enumerate(GUIDANCE):
        asked = RequestedParams(
            prompt="a red circle", seed=i, guidance_scale=guidance, num_inference_steps=4, scheduler="euler_a"
        )
        samples.append(Sample(id=SampleId("r", i), params=engine.capabilities.resolve(asked, fallback_seed=0)))
    ids = tuple(sample.id for sample in samples)
    for call in range(4):
        engine.run(StepPlan(joins=() if call else tuple(samples), steps=ids))
    return [progress.picture for progress in engine.run(StepPlan(decodes=ids))]


@pytest.fixture
def memory_for(demo):
    """Let the device refuse UNet calls of more samples than this."""
    hooks = []

    def limit(max_samples: int) -> None:
        def refuse(_, inputs) -> None:
            if inputs[0].shape[0] > max_samples:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        hooks.append(demo.pipeline.unet.conv_in.register_forward_pre_hook(refuse))

    yield limit
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("max_samples", [4, 2, 1])
def test_pictures_are_those_of_a_device_with_enough_memory(demo, memory_for, max_samples):
    expected = draw(native_engine(demo, max_slots=8))
    memory_for(max_samples)
    engine = native_engine(demo, max_slots=8)
    for made, true in zip(draw(engine), expected, strict=True):
        assert np.abs(np.frombuffer(made.rgb, np.uint8).astype(int) - np.frombuffer(true.rgb, np.uint8)).max() <= 1


def test_the_capacity_found_is_reported_and_kept(demo, memory_for):
    memory_for(2)
    engine = native_engine(demo, max_slots=8)
    assert engine.capacity.max_latent_pixels_per_call is None
    draw(engine)
    found = engine.capacity.max_latent_pixels_per_call
    assert 64 <= found <= 2 * 2 * 64
    draw(engine)
    assert engine.capacity.max_latent_pixels_per_call == found


def test_when_not_even_one_sample_fits_the_engine_fails(demo, memory_for):
    memory_for(0)
    with pytest.raises(EngineError, match="out of memory"):
        draw(native_engine(demo, max_slots=8))


class LoneRank(RankGroup):
    """Of two ranks, the one that the test looks at. The other finds that so many of the first calls do not fit."""

    def __init__(self, num_refused: int = 0) -> None:
        super().__init__(0, 2)
        self.num_exchanged = 0
        self._num_refused = num_refused

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_exchanged += not self._is_apart
        return torch.cat((tensor, tensor))

    def gather_objects(self, one: object) -> list[object]:
        self._num_refused -= 1
        return [one, self._num_refused < 0]


def test_a_rank_does_not_go_on_with_smaller_calls_than_the_others(demo, memory_for):
    memory_for(1)
    engine = native_engine(demo, max_slots=8, group=LoneRank())
    with pytest.raises(EngineError, match="out of memory"):
        draw(engine)


@pytest.mark.parametrize(("max_samples", "num_refused"), [(2, 0), (8, 2), (2, 1)], ids=["here", "there", "both"])
def test_ranks_leave_out_the_buckets_that_do_not_fit_on_one_of_them(demo, memory_for, max_samples, num_refused):
    buckets = declare_buckets(8, 8, 8)
    memory_for(max_samples)
    engine = native_engine(demo, max_slots=8, buckets=buckets, group=(group := LoneRank(num_refused)))
    engine._denoiser.prepare()
    bound = engine.capacity.max_latent_pixels_per_call
    prepared = set(engine._denoiser._prepared)
    assert prepared == {bucket for bucket in buckets if bucket.num_latent_pixels <= bound}
    own = {bucket: len(shares(bucket.num_samples, bucket.num_rows, 2)[0].samples) for bucket in buckets}
    assert max(own[bucket] for bucket in prepared) <= max_samples
    left_out = [bucket for bucket in buckets if bucket not in prepared]
    assert bound == left_out[-1].num_latent_pixels - 1
    assert left_out[-1].num_latent_pixels == buckets[num_refused - 1].num_latent_pixels or own[left_out[-1]] > max_samples
    assert group.num_exchanged == 0, "a rank that fails would leave the other waiting"


def test_sizes_that_do_not_fit_are_left_out_of_the_buckets(demo, memory_for):
    expected = draw(native_engine(demo, max_slots=8))
    memory_for(4)
    engine = native_engine(demo, max_slots=8, buckets=declare_buckets(8, 8, 8))
    engine.warmup()
    assert engine.capacity.max_latent_pixels_per_call < 8 * 64 * 2
    assert engine.num_graph_misses == 0
    for made, true in zip(draw(engine), expected, strict=True):
        assert np.abs(np.frombuffer(made.rgb, np.uint8).astype(int) - np.frombuffer(true.rgb, np.uint8)).max() <= 1

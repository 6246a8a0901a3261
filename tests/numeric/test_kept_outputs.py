"""A captured turn answers into always the same tensors. What the denoiser hands out is not them.

On a CPU there are no graphs, but a prepared turn keeps its tensors all the same, so what sharing them would do shows here too.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from buckets import sample_inputs, worst_bucket
from drawing import draw

from mii_serve.engine.batched import BatchedEngine
from mii_serve.engine.batched.buckets import declare_buckets
from mii_serve.engine.kernels.native import NativeKernels
from mii_serve.engine.reference import ReferenceEngine
from mii_serve.types import Picture, RequestedParams, Sample, SampleId, StepPlan

pytestmark = pytest.mark.usefixtures("one_thread")


PIXELS_OF_TWO = 2 * 2 * 64
"""Latent pixels × rows of two guided samples of 64 × 64 pixels."""


def engine(demo, *, max_latent_pixels: int | None = None, has_buckets: bool = True) -> BatchedEngine:
    kernels = NativeKernels(demo.pipeline.unet, max_latent_pixels_per_call=max_latent_pixels)
    return BatchedEngine(demo, kernels, max_slots=4, buckets=declare_buckets(4, 8, 8) if has_buckets else ())


def prepare(built: BatchedEngine) -> None:
    with torch.inference_mode():
        built._denoiser.prepare()


def previews(built: BatchedEngine) -> list[Picture]:
    """Of four samples in one turn."""
    prepare(built)
    asked = [RequestedParams(prompt="a red circle", seed=i, num_inference_steps=4) for i in range(4)]
    samples = [
        Sample(id=SampleId("r", i), params=built.capabilities.resolve(one, fallback_seed=0)) for i, one in enumerate(asked)
    ]
    ids = tuple(sample.id for sample in samples)
    made = [progress.preview for progress in built.run(StepPlan(joins=tuple(samples), steps=ids, previews=ids))]
    built.run(StepPlan(leaves=ids))
    return made


def levels_off(one: Picture, other: Picture) -> int:
    return int(np.abs(np.frombuffer(one.rgb, np.uint8).astype(int) - np.frombuffer(other.rgb, np.uint8)).max())


def test_two_calls_of_one_prepared_size_in_a_turn_do_not_overwrite_each_other(demo):
    true = previews(engine(demo, has_buckets=False))
    assert levels_off(true[0], true[2]) > 20, "the first and the third sample, in the same place of the two calls, differ"
    for made, expected in zip(previews(engine(demo, max_latent_pixels=PIXELS_OF_TWO)), true, strict=True):
        assert levels_off(made, expected) <= 1


@pytest.mark.parametrize("guidance_scale", [1.0, 0.0, 3.0])
def test_pndm_keeps_no_history_in_them(demo, guidance_scale):
    built = engine(demo)
    prepare(built)
    asked = {"scheduler": "pndm", "guidance_scale": guidance_scale, "num_inference_steps": 4}
    assert levels_off(draw(built, **asked), draw(ReferenceEngine(demo), **asked)) <= 1
    assert built.num_graph_misses == 0


def test_a_bound_given_beforehand_is_kept_and_reported(demo):
    built = engine(demo, max_latent_pixels=PIXELS_OF_TWO)
    seen = []
    hook = demo.pipeline.unet.conv_out.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[0] * 64))
    previews(built)
    hook.remove()
    assert max(seen) == PIXELS_OF_TWO == built.capacity.max_latent_pixels_per_call


def test_what_it_hands_out_is_its_callers(demo):
    built = engine(demo)
    prepare(built)
    draw(built, num_inference_steps=1)  # so that it knows a time and a prompt
    inputs = [sample_inputs(0, is_guided=False)]
    with torch.inference_mode():
        built._denoiser.pool((8, 8)).state.normal_()
        first = built._denoiser.step(inputs, (8, 8))
        kept = [tensor.clone() for tensor in first]
        for tensor in built._denoiser.step(inputs, (8, 8)):
            tensor.fill_(7.0)
    assert built.num_graph_misses == 0
    assert all(torch.equal(tensor, before) for tensor, before in zip(first, kept, strict=True))


def test_every_prepared_size_makes_what_is_made_without_it(demo):
    built = engine(demo)
    prepare(built)
    draw(built, num_inference_steps=1)  # so that it knows a time and two prompts
    error, num_sizes = worst_bucket(built)
    assert num_sizes == 10 and error < 1e-5


def test_buckets_that_take_too_long_to_capture_are_padded_to_larger_ones(demo):
    built = engine(demo)
    moments = itertools.count(step=25.0)
    with torch.inference_mode():
        built._denoiser.prepare(clock=lambda: next(moments))
    assert sorted(bucket.num_rows for bucket in built._denoiser._prepared) == [6, 8], "the largest ones, in a minute"
    draw(built, num_inference_steps=2)
    assert built.num_graph_misses == 0

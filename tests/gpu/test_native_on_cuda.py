"""The native engine on CUDA: FP32 draws the reference's pictures, graphs change nothing, half precision stays close."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from buckets import worst_bucket
from drawing import draw, draw_ahead, draw_batch, run_alone
from samplers import USUAL

from mii_serve.config import LimitsConfig
from mii_serve.engine.batched import BatchedEngine
from mii_serve.engine.factory import native_engine
from mii_serve.engine.reference import ReferenceEngine
from mii_serve.models import load_model
from mii_serve.types import Picture, RequestedParams, Sample, SampleId, StepPlan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MAX_LEVELS_OFF_FP32 = 1
MIN_PSNR_FP16_DB = 30.0
"""Against FP32 on the same device, for the built-in model; half precision has 11 bits."""


@pytest.fixture(scope="module", autouse=True)
def no_tf32():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def load(dtype: str, model: str = "demo"):
    return load_model(model, revision=None, dtype=dtype, device="cuda", limits=LimitsConfig(), enable_safety_checker=False)


@pytest.fixture(scope="module")
def reference() -> ReferenceEngine:
    return ReferenceEngine(load("fp32"))


@pytest.fixture(scope="module")
def fp32() -> BatchedEngine:
    engine = native_engine(load("fp32"), max_slots=8)
    engine.warmup()
    return engine


@pytest.fixture(scope="module")
def fp16() -> BatchedEngine:
    engine = native_engine(load("fp16"), max_slots=8)
    engine.warmup()
    return engine


def levels(picture: Picture) -> np.ndarray:
    return np.frombuffer(picture.rgb, np.uint8).astype(int)


@pytest.mark.parametrize("scheduler", USUAL)
def test_fp32_through_graphs_draws_what_the_reference_draws(reference, fp32, scheduler):
    made, true = (draw(engine, scheduler=scheduler, num_inference_steps=10) for engine in (fp32, reference))
    assert np.abs(levels(made) - levels(true)).max() <= MAX_LEVELS_OFF_FP32
    assert fp32.num_graph_misses == 0


def test_a_mixed_batch_draws_what_each_draws_alone_on_the_reference(reference, fp32):
    asked = [
        {"prompt": "a red circle", "seed": 1, "scheduler": "euler_a", "num_inference_steps": 12, "guidance_scale": 3.0},
        {"prompt": "a green star", "seed": 2, "scheduler": "pndm", "num_inference_steps": 20, "guidance_scale": 1.0},
        {"prompt": "a blue ring", "seed": 3, "scheduler": "dpm++_2m", "num_inference_steps": 7, "negative_prompt": "star"},
        {"prompt": "a red circle", "seed": 4, "scheduler": "unipc", "num_inference_steps": 9, "guidance_scale": 5.0},
        {"prompt": "a blue ring", "seed": 5, "scheduler": "dpm++_2m_sde", "num_inference_steps": 15},
    ]
    for one, made in zip(asked, draw_batch(fp32, asked), strict=True):
        params = reference.capabilities.resolve(RequestedParams(**one), fallback_seed=0)
        true = run_alone(reference, params, 0)[0]
        assert np.abs(levels(made) - levels(true)).max() <= MAX_LEVELS_OFF_FP32
    assert fp32.num_graph_misses == 0


def test_every_bucket_replays_what_is_made_without_a_graph(fp32, fp16):
    for engine, most in ((fp32, 1e-5), (fp16, 0.005)):
        error, num_buckets = worst_bucket(engine)
        assert num_buckets == 18 and error < most


def test_turns_launched_ahead_draw_what_single_turns_draw(fp32):
    asked = [{"seed": i, "num_inference_steps": 5 + i, "guidance_scale": 1.0 + 3 * (i % 2)} for i in range(12)]
    ahead = draw_ahead(fp32, asked)
    for one, made in zip(asked, ahead, strict=True):
        params = fp32.capabilities.resolve(RequestedParams(prompt="a red circle", **one), fallback_seed=0)
        assert np.abs(levels(made) - levels(run_alone(fp32, params, 0)[0])).max() <= MAX_LEVELS_OFF_FP32


def test_the_host_does_not_wait_for_the_turn_it_launches(fp32):
    params = fp32.capabilities.resolve(RequestedParams(prompt="a red circle", num_inference_steps=20), fallback_seed=0)
    samples = tuple(Sample(id=SampleId("r", i), params=params) for i in range(8))
    ids = tuple(one.id for one in samples)
    fp32.run(StepPlan(joins=samples, steps=ids))
    torch.cuda._sleep(10**9)  # half a second or so of the device's time
    turn = fp32.launch(StepPlan(steps=ids))
    assert not turn.is_done()
    assert [progress.step for progress in turn.wait().progress] == [2] * 8
    fp32.run(StepPlan(leaves=ids))


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
def test_pndm_without_guidance_keeps_no_history_in_a_graphs_outputs(reference, fp32, guidance_scale):
    asked = {"scheduler": "pndm", "guidance_scale": guidance_scale, "num_inference_steps": 12}
    made, true = (draw(engine, **asked) for engine in (fp32, reference))
    assert np.abs(levels(made) - levels(true)).max() <= MAX_LEVELS_OFF_FP32


def test_a_batch_without_a_bucket_is_counted_and_drawn_all_the_same(reference, fp32):
    before = fp32.num_graph_misses
    made, true = (draw(engine, height=96, num_inference_steps=5) for engine in (fp32, reference))
    assert np.abs(levels(made) - levels(true)).max() <= MAX_LEVELS_OFF_FP32
    assert fp32.num_graph_misses == before + engine_calls(fp32, 5)


def engine_calls(engine: BatchedEngine, steps: int) -> int:
    return engine.check(engine.capabilities.resolve(RequestedParams(prompt="a", num_inference_steps=steps), fallback_seed=0))


def test_the_same_request_twice_is_the_same_bits(fp16):
    assert draw(fp16, num_inference_steps=10) == draw(fp16, num_inference_steps=10)


@pytest.mark.parametrize("scheduler", ["pndm", "euler_a", "dpm++_2m", "unipc"])
def test_half_precision_stays_close_to_the_reference(reference, fp16, scheduler):
    made, true = (draw(engine, scheduler=scheduler, num_inference_steps=20) for engine in (fp16, reference))
    error = np.mean((levels(made) - levels(true)) ** 2.0)
    assert 10 * np.log10(255**2 / max(error, 1e-9)) >= MIN_PSNR_FP16_DB


def test_full_size_random_weights_make_a_batch_in_half_precision():
    engine = native_engine(load("fp16", "random-sd-v1-4"), max_slots=4)
    engine.warmup()
    asked = [{"prompt": f"number {i}", "seed": i, "num_inference_steps": 3 + i} for i in range(4)]
    pictures = draw_batch(engine, asked)
    assert all((picture.width, picture.height) == (512, 512) and len(set(picture.rgb)) > 8 for picture in pictures)
    assert engine.num_graph_misses == 0

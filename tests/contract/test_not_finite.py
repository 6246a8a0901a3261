"""A picture that is not finite fails by itself, in words that help, and never leaves as a black one. Others are unharmed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from drawing import sample

from mii_serve.config import LimitsConfig
from mii_serve.engine.batched import BatchedEngine
from mii_serve.engine.batched.buckets import declare_buckets
from mii_serve.engine.decode import decode
from mii_serve.engine.factory import native_engine
from mii_serve.engine.reference import ReferenceEngine
from mii_serve.errors import EngineError, NotFiniteError
from mii_serve.models import Precision, load_model
from mii_serve.types import SampleProgress, StepPlan

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error:invalid value encountered in cast")]

POISON = "star"
"""Prompts with this word are not finite once `poison_a_word` was there."""

REQUESTS = [
    {"prompt": "a red circle", "num_inference_steps": 4, "scheduler": "ddim", "seed": 1},
    {"prompt": f"a blue {POISON}", "num_inference_steps": 4, "scheduler": "pndm", "seed": 2},
    {"prompt": "a green square", "num_inference_steps": 5, "scheduler": "euler_a", "seed": 3},
    {"prompt": "two circles", "num_inference_steps": 5, "scheduler": "dpm++_2m", "seed": 4, "guidance_scale": 1.0},
]
POISONED = 1


def load(dtype: Precision = "fp32"):
    model = load_model("demo", revision=None, dtype=dtype, device="cpu", limits=LimitsConfig())
    model.pipeline.safety_checker.concept_embeds_weights.data.fill_(2.0)  # never fires
    return model


ENGINES: dict[str, Callable[..., ReferenceEngine | BatchedEngine]] = {
    "reference": ReferenceEngine,
    "native": native_engine,
    "native, padded": lambda model: native_engine(model, max_slots=4, buckets=declare_buckets(4, 8, 8)),
}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request):
    made = ENGINES[request.param](load())
    made.warmup()
    yield made
    made.close()


@pytest.fixture
def poisoned(engine):
    """One word's embedding is not a number. Prompts are cached, so both sides of the fixture start from other prompts."""
    pipeline = engine._pipeline
    token = pipeline.tokenizer(POISON, add_special_tokens=False).input_ids[-1]
    embedding = pipeline.text_encoder.get_input_embeddings().weight.data
    before = embedding[token].clone()
    embedding[token] = torch.nan
    yield engine
    embedding[token] = before


def run_batch(engine, requests) -> list[SampleProgress]:
    samples = [sample(engine, f"r{i}", **asked) for i, asked in enumerate(requests)]
    made = finish_all(engine, samples)
    return [made[one.id] for one in samples]


def finish_all(engine, samples) -> dict:
    """The last word on each sample, also where one ends early."""
    last: dict = {}
    calls_left = {one.id: engine.check(one.params) for one in samples}
    joins = tuple(samples)
    while calls_left:
        ending = tuple(one for one, left in calls_left.items() if left == 1)
        for progress in engine.run(StepPlan(joins=joins, steps=tuple(calls_left), decodes=ending)):
            last[progress.id] = progress
            calls_left[progress.id] -= 1
            if progress.is_over:
                del calls_left[progress.id]
        joins = ()
    return last


def test_one_picture_fails_and_the_others_are_what_they_are_without_it(engine, poisoned):
    healthy = [{**asked, "prompt": asked["prompt"].replace(POISON, "ring")} for asked in REQUESTS]
    expected = run_batch(engine, healthy)
    made = run_batch(engine, REQUESTS)
    for index, (ours, true) in enumerate(zip(made, expected, strict=True)):
        if index == POISONED:
            assert isinstance(ours.error, NotFiniteError)
            assert ours.picture is None
            assert "not finite" in str(ours.error)
        else:
            assert ours.error is None
            assert ours.picture.rgb == true.picture.rgb


def test_whoever_gets_the_slot_next_is_unharmed(engine, poisoned):
    good = {"prompt": "a white cross", "num_inference_steps": 6, "scheduler": "dpm++_3m", "seed": 9}
    before = run_batch(engine, [good])[0].picture.rgb
    slots = engine.capacity.max_slots
    for progress in run_batch(engine, [{**REQUESTS[POISONED], "seed": seed} for seed in range(slots)]):
        assert isinstance(progress.error, NotFiniteError)
    for progress in run_batch(engine, [good] * slots):
        assert progress.error is None
    assert run_batch(engine, [good])[0].picture.rgb == before


def test_a_poisoned_negative_prompt_fails_too(engine, poisoned):
    [progress] = run_batch(engine, [{**REQUESTS[0], "negative_prompt": f"an ugly {POISON}"}])
    assert isinstance(progress.error, NotFiniteError)


def test_latents_that_overflow_on_the_way_fail_with_the_preview_that_shows_it(engine):
    one = sample(engine, "r", prompt="a red ring", num_inference_steps=6, scheduler="ddim", seed=5)
    engine.run(StepPlan(joins=(one,), steps=(one.id,)))
    running = engine._samples[one.id]
    if isinstance(engine, BatchedEngine):
        with torch.inference_mode():
            engine._denoiser.pool(running.latent_shape).state[running.slot, 0, 0, 0, 0] = torch.inf
    else:
        running.latents[0, 0, 0, 0] = torch.inf
    [progress] = engine.run(StepPlan(steps=(one.id,), previews=(one.id,)))
    assert isinstance(progress.error, NotFiniteError)
    assert "after step 2" in str(progress.error)
    assert engine.run(StepPlan(decodes=(one.id,))) == (), "it is forgotten"


def test_a_preview_that_cannot_be_estimated_is_left_out_and_the_picture_comes(engine, monkeypatch):
    """Where a schedule starts from pure noise, nothing can be said about the picture at first."""
    module = f"mii_serve.engine.{'batched.engine' if isinstance(engine, BatchedEngine) else 'reference'}"
    monkeypatch.setattr(f"{module}.estimate_x0", lambda model_input, model_output, x0: model_input * torch.inf)
    one = sample(engine, "r", prompt="a red ring", num_inference_steps=2, scheduler="ddim", seed=5)
    [progress] = engine.run(StepPlan(joins=(one,), steps=(one.id,), previews=(one.id,)))
    assert (progress.preview, progress.error) == (None, None)
    [progress] = engine.run(StepPlan(steps=(one.id,), decodes=(one.id,)))
    assert progress.picture is not None


@pytest.mark.parametrize("kind", ENGINES)
def test_an_engine_whose_warm_up_picture_is_not_finite_is_not_ready(kind):
    model = load()
    model.pipeline.vae.decoder.conv_in.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(EngineError, match=r"warm-up picture is not finite.*cannot be served like this.*its VAE"):
        ENGINES[kind](model).warmup()


# ---- a VAE that overflows in fp16 ----------------------------------------------------------------------------------


def overflowing(vae) -> None:
    """The same images in fp32; between two convolutions of the decoder the values are beyond what fp16 holds."""
    vae.decoder.conv_in.weight.data *= 2.0**15
    vae.decoder.conv_in.bias.data *= 2.0**15
    vae.post_quant_conv.weight.data *= 2.0**4
    vae.post_quant_conv.bias.data *= 2.0**4


def demo_vae(dtype: torch.dtype):
    return load().pipeline.vae.to(dtype)


def some_latents(count: int) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_an_fp16_vae_that_overflows_is_decoded_again_in_fp32():
    in_fp16, in_fp32 = demo_vae(torch.float16), demo_vae(torch.float16).to(torch.float32)
    overflowing(in_fp16)
    overflowing(in_fp32)
    weights = {name: tensor.clone() for name, tensor in in_fp16.state_dict().items()}
    with torch.inference_mode():
        found, true = decode(in_fp16, some_latents(2)), decode(in_fp32, some_latents(2))
    assert found.faults == [None, None]
    assert found.images.dtype == torch.float16
    assert (found.images.float() - true.images).abs().max() < 2e-3, "the rounding of fp16 at the end"
    assert in_fp16.dtype == torch.float16
    for name, tensor in in_fp16.state_dict().items():
        assert torch.equal(tensor, weights[name])
        assert not tensor.is_inference()


def test_only_the_image_that_overflows_is_decoded_again():
    vae, latents = demo_vae(torch.float16), some_latents(3)
    before = decode(vae, latents).images
    latents[1] *= 1e5  # beyond fp16 before the first convolution
    found = decode(vae, latents)
    assert found.faults == [None, None, None]
    assert torch.equal(found.images[[0, 2]], before[[0, 2]])
    assert found.images[1].isfinite().all()


def test_a_vae_that_says_it_needs_no_fp32_is_not_decoded_again():
    vae = demo_vae(torch.float16)
    overflowing(vae)
    vae.register_to_config(force_upcast=False)
    assert decode(vae, some_latents(2)).faults == ["image", "image"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_overflows_in_fp16_only_is_right_at_once_in_other_precisions(dtype):
    vae = demo_vae(dtype)
    overflowing(vae)
    assert decode(vae, some_latents(2)).faults == [None, None]


def test_latents_that_are_not_finite_are_not_decoded_again(monkeypatch):
    latents = some_latents(2)
    latents[0, 0, 0, 0] = torch.nan
    monkeypatch.setattr("mii_serve.engine.decode._decode_in_fp32", None)
    found = decode(demo_vae(torch.float16), latents)
    assert found.faults == ["latents", None]
    assert found.good == [1]
    assert found.good_images.isfinite().all()


def test_an_fp16_deployment_of_a_vae_that_overflows_draws_what_fp32_draws():
    pictures = []
    for dtype in ("fp16", "fp32"):
        model = load(dtype)
        overflowing(model.pipeline.vae)
        engine = native_engine(model)
        engine.warmup()
        [progress] = run_batch(engine, [{"prompt": "a red circle", "num_inference_steps": 5, "scheduler": "ddim", "seed": 1}])
        pictures.append(torch.frombuffer(bytearray(progress.picture.rgb), dtype=torch.uint8).float())
    assert (pictures[0] - pictures[1]).abs().mean() < 2.0, "levels of 255: what half precision in the UNet makes"
    assert len(set(pictures[0].tolist())) > 64


@pytest.mark.parametrize(
    ("dtype", "force_upcast", "words"),
    [("fp16", True, "nor in fp32"), ("fp16", False, "force_upcast"), ("bf16", True, "--dtype fp32"), ("fp32", True, "weights")],
)
def test_the_error_says_what_to_do(dtype, force_upcast, words):
    model = load(dtype)
    model.pipeline.vae.register_to_config(force_upcast=force_upcast)
    model.pipeline.vae.decoder.conv_out.weight.data[0, 0, 0, 0] = torch.nan
    engine = native_engine(model)
    [progress] = run_batch(engine, [{"prompt": "a red circle", "num_inference_steps": 1, "scheduler": "ddim", "seed": 1}])
    assert isinstance(progress.error, NotFiniteError)
    assert words in str(progress.error)


def test_latents_that_overflow_in_fp16_suggest_bf16():
    model = load("fp16")
    model.pipeline.unet.conv_out.bias.data.fill_(torch.inf)
    [progress] = run_batch(native_engine(model), [{"prompt": "a", "num_inference_steps": 1, "scheduler": "ddim", "seed": 1}])
    assert isinstance(progress.error, NotFiniteError)
    assert "--dtype bf16" in str(progress.error)

"""`mii_serve verify` tells a right engine from a wrong one, and says where it goes wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from fake_engine import FakeEngine

import mii_serve.engine.factory
import mii_serve.verify.runs
import mii_serve.verify.truth
from mii_serve.config import DeployConfig, LimitsConfig
from mii_serve.engine.batched import BatchedEngine
from mii_serve.engine.batched.buckets import declare_buckets
from mii_serve.engine.decode import Decoded, decode
from mii_serve.engine.factory import native_engine
from mii_serve.errors import ConfigError, EngineError, InvalidRequestError, VerificationError
from mii_serve.models import Precision, load_model
from mii_serve.replica.local import build_warm_engine
from mii_serve.verify.cases import DRAWINGS
from mii_serve.verify.check import verify
from mii_serve.verify.drawing import draw
from mii_serve.verify.limits import Stage
from mii_serve.verify.pipeline import CHECKED, DEFAULT, NAMED, PipelinePair
from mii_serve.verify.truth import Truth, learn_truth

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CONFIG = {"model": "demo", "device": "cpu"}
FEW_STEPS = 5
"""Of the pictures that are drawn where one stage is wrong: enough to see that later stages are asked too."""


@pytest.fixture(scope="module")
def truth(one_thread) -> Truth:
    return learn_truth(DeployConfig.load(CONFIG))


@pytest.fixture(scope="module")
def short_truth(truth) -> Truth:
    cases = tuple(case for case in truth.cases if case.params.num_inference_steps <= FEW_STEPS)
    assert len(cases) == 2
    return dataclasses.replace(truth, cases=cases)


def native(dtype: Precision = "fp32", **options) -> BatchedEngine:
    model = load_model("demo", revision=None, dtype=dtype, device="cpu", limits=LimitsConfig())
    return native_engine(model, **options)


def test_the_truth_is_complete_and_worth_comparing_with(truth):
    assert not truth.skipped
    assert len(truth.cases) == len(DRAWINGS)
    assert len(truth.pictures) == sum(case.params.num_images_per_prompt for case in truth.cases)
    for name, picture in truth.pictures.items():
        assert len(set(picture.rgb)) > 8, f"there is nothing on the picture of {name}"
    assert {case.params.is_guided for case in truth.cases} == {True, False}
    assert len({case.params.latent_shape for case in truth.cases}) == 2
    assert any(image.abs().max() > 0.3 for image in truth.images.values())


def test_the_reference_was_held_against_diffusers_own_pipeline_first(truth):
    assert list(truth.pipeline) == [DEFAULT, NAMED, CHECKED]
    for pair in truth.pipeline.values():
        assert pair.ours.rgb == pair.plain.rgb
        assert pair.ours.nsfw_content_detected == pair.plain.nsfw_content_detected
    assert truth.pipeline[CHECKED].plain.nsfw_content_detected is not None
    assert len(set(truth.pipeline[DEFAULT].plain.rgb)) > 64
    assert truth.pipeline[DEFAULT].plain.rgb != truth.pipeline[NAMED].plain.rgb


def test_the_native_engine_passes_in_bf16_though_every_stage_is_less_exact(short_truth):
    report = verify(native("bf16"), short_truth)
    assert report.is_passed, report.verdict
    assert report.engine.dtype == "bf16"
    off = {check.stage for check in report.checks if check.difference.relative_rms > 1e-3}
    assert off == set(Stage) - {Stage.PIPELINE}


def test_turns_padded_as_for_cuda_graphs_pass(short_truth):
    report = verify(native(max_slots=4, buckets=declare_buckets(4, 8, 8)), short_truth)
    assert report.is_passed, report.verdict


def test_the_reference_is_itself(short_truth):
    engine = build_warm_engine(DeployConfig.load({**CONFIG, "engine": "reference"}))
    report = verify(engine, short_truth)
    assert report.is_passed
    assert {check.difference.max for check in report.checks} == {0.0}


def test_an_engine_of_two_ranks_passes_and_has_its_checkers_back(short_truth):
    engine = build_warm_engine(DeployConfig.load({**CONFIG, "engine": "native", "tensor_parallel": 2}))
    try:
        report = verify(engine, short_truth)
        assert report.is_passed, report.verdict
        assert (report.engine.num_ranks, report.engine.parallelism) == (2, "rows")
        made = draw(engine, short_truth.cases[:2])
        assert len(made) >= 2, "one for each rank to check"
        assert all(picture.nsfw_content_detected is not None for picture in made.values())
    finally:
        engine.close()


def test_an_engine_is_the_same_after_it_was_verified(short_truth):
    engine = native()
    before = draw(engine, short_truth.cases[:1])
    verify(engine, short_truth)
    assert draw(engine, short_truth.cases[:1]) == before
    assert all(picture.nsfw_content_detected is not None for picture in before.values()), "the checker is back"


# ---- what is wrong is found ----------------------------------------------------------------------------------------


def five_percent(part: str, weight: str) -> Callable[[BatchedEngine], None]:
    """One weight of a part of the pipeline, five per cent too large."""

    def plant(engine: BatchedEngine) -> None:
        named = getattr(engine._pipeline, part).named_parameters()
        next(values for name, values in named if name.endswith(weight)).data.mul_(1.05)

    return plant


def drop_a_key(engine: BatchedEngine) -> None:
    """The last token has no key in any cross-attention: what kernels that take 76 of 77 tokens do."""
    project = engine._prompts._kernels.project_prompts

    def without_the_last(embeds: torch.Tensor) -> torch.Tensor:
        key_values = project(embeds)
        key_values[:, -1, : key_values.shape[-1] // 2] = 0
        return key_values

    engine._prompts._kernels.project_prompts = without_the_last


def mix_up_times(engine: BatchedEngine) -> None:
    """Each row gets its neighbour's timestep. Alone there is no neighbour."""
    rows = engine._timesteps.rows
    engine._timesteps.rows = lambda *wanted: [*(found := rows(*wanted))[1:], found[0]]


def forget_guidance(engine: BatchedEngine) -> None:
    """Pictures only: the scale that requests ask for is lost on its way, single calls are right."""
    right = engine._inputs

    def wrong(due, failed):
        able, inputs = right(due, failed)
        return able, [dataclasses.replace(one, guidance_scale=1.1) for one in inputs]

    engine._inputs = wrong


def spoil(engine: BatchedEngine) -> None:
    engine._pipeline.vae.decoder.conv_in.weight.data[0, 0, 0, 0] = torch.nan


@pytest.mark.parametrize(
    ("plant", "stage"),
    [
        (five_percent("text_encoder", "layers.0.mlp.fc1.weight"), Stage.TEXT_ENCODER),
        (five_percent("unet", "mid_block.resnets.0.conv1.weight"), Stage.UNET),
        (five_percent("unet", "attn1.to_q.weight"), Stage.UNET),
        (five_percent("vae", "decoder.up_blocks.1.resnets.0.conv1.weight"), Stage.VAE),
        (drop_a_key, Stage.UNET),
        (mix_up_times, Stage.UNET),
        (forget_guidance, Stage.PICTURES),
    ],
    ids=["text-mlp", "unet-conv", "unet-query", "vae-conv", "key-dropped", "times-mixed-up", "guidance-lost"],
)
def test_a_planted_error_is_found_and_its_stage_named(short_truth, plant, stage):
    engine = native()
    plant(engine)
    report = verify(engine, short_truth)
    assert not report.is_passed
    assert report.first_failure.stage is stage
    assert f"the {stage} fails first" in report.verdict
    before_pictures = {check.stage for check in report.checks if not check.is_passed} - {Stage.PICTURES}
    assert before_pictures <= {stage}, "the other stages are asked with right input, and answer rightly"
    assert len(report.checks) == 3 + 2 * (6 + 8 + 4 + len(report.pictures)), "everything is asked all the same"


def test_an_engine_whose_vae_is_not_finite_is_found_before_it_draws(short_truth):
    engine = native()
    spoil(engine)
    report = verify(engine, short_truth)
    assert report.first_failure.stage is Stage.VAE
    assert "NotFiniteError" in report.checks[-1].faults[0]


def another_picture(pair: PipelinePair) -> PipelinePair:
    rgb = bytes([pair.ours.rgb[0] ^ 1]) + pair.ours.rgb[1:]
    return dataclasses.replace(pair, ours=dataclasses.replace(pair.ours, rgb=rgb))


def another_flag(pair: PipelinePair) -> PipelinePair:
    return dataclasses.replace(pair, ours=dataclasses.replace(pair.ours, nsfw_content_detected=None))


def no_picture(pair: PipelinePair) -> PipelinePair:
    return PipelinePair(fault="diffusers cannot draw it: ValueError: no such file")


@pytest.mark.parametrize(
    ("change", "case", "words"),
    [
        (another_picture, NAMED, "max is 1"),
        (another_flag, CHECKED, "is None, the pipeline's is"),
        (no_picture, DEFAULT, "no such"),
    ],
)
def test_a_reference_that_is_not_the_pipeline_fails_whatever_the_engine_draws(short_truth, change, case, words):
    """Both may be wrong alike."""
    pairs = {**short_truth.pipeline, case: change(short_truth.pipeline[case])}
    report = verify(native(), dataclasses.replace(short_truth, pipeline=pairs))
    assert report.first_failure.stage is Stage.PIPELINE
    assert f"is not diffusers' own StableDiffusionPipeline ({case}: " in report.verdict
    assert words in report.verdict


def test_a_loader_that_leaves_something_out_is_found_on_the_model_at_hand(monkeypatch):
    """The reference and every engine share our loader: with the last text layer lost, they are wrong alike."""
    load = mii_serve.engine.factory.load_model

    def lossy(*arguments, **settings):
        model = load(*arguments, **settings)
        model.pipeline.text_encoder.encoder.layers[-1].mlp.fc2.weight.data.zero_()
        return model

    monkeypatch.setattr(mii_serve.engine.factory, "load_model", lossy)
    monkeypatch.setattr(mii_serve.verify.truth, "picture_cases", lambda capabilities: [])
    found = learn_truth(DeployConfig.load(CONFIG)).pipeline
    assert found[DEFAULT].ours.rgb != found[DEFAULT].plain.rgb


def test_without_the_checker_diffusers_draws_without_it_too(monkeypatch):
    monkeypatch.setattr(mii_serve.verify.truth, "picture_cases", lambda capabilities: [])
    found = learn_truth(DeployConfig.load({**CONFIG, "enable_safety_checker": False})).pipeline
    assert list(found) == [DEFAULT, NAMED]
    for pair in found.values():
        assert pair.ours.rgb == pair.plain.rgb
        assert pair.plain.nsfw_content_detected is None


@pytest.mark.parametrize("plant", [drop_a_key, five_percent("text_encoder", "layers.0.mlp.fc1.weight")], ids=["key", "text"])
def test_half_precision_does_not_hide_a_gross_error(short_truth, plant):
    engine = native("bf16")
    plant(engine)
    assert not verify(engine, short_truth).is_passed


def test_what_is_wrong_only_in_a_batch_is_found_there(short_truth):
    engine = native()
    mix_up_times(engine)
    failed = [check for check in verify(engine, short_truth).checks if not check.is_passed]
    assert failed
    assert {check.batching for check in failed} == {"batched"}


def test_a_stage_that_fails_instead_of_answering_is_named(short_truth):
    engine = native()
    engine._denoiser.step = lambda inputs, shape, has_outputs=True: torch.empty(1, 2) @ torch.empty(3, 4)
    report = verify(engine, short_truth)
    assert report.first_failure.stage is Stage.UNET
    assert "no answer, RuntimeError" in report.first_failure.faults[0]
    assert "the unet fails first" in report.verdict
    assert report.to_json()["checks"][-1]["difference"] is None
    assert list(report.lines())


def test_an_output_of_another_size_is_a_failure_and_no_crash(short_truth, monkeypatch):
    def narrower(vae, latents):
        return Decoded(decode(vae, latents).images[..., :-8], [None] * len(latents))

    monkeypatch.setattr("mii_serve.engine.batched.probe.decode", narrower)
    failure = verify(native(), short_truth).first_failure
    assert failure.stage is Stage.VAE
    assert "has the shape" in failure.faults[0]


def test_an_engine_without_a_probe_cannot_be_verified(short_truth):
    with pytest.raises(EngineError, match="'fake' cannot be verified"):
        verify(FakeEngine(), short_truth)


# ---- a replica that is to verify -----------------------------------------------------------------------------------


@pytest.fixture
def planted(monkeypatch, short_truth):
    """What `deploy --verify` builds has a dropped key; the truth is at hand already."""

    def build(config: DeployConfig) -> BatchedEngine:
        engine = native()
        drop_a_key(engine)
        return engine

    monkeypatch.setattr(mii_serve.verify.runs, "build_engine", build)
    monkeypatch.setattr(mii_serve.verify.runs, "learn_truth", lambda config: short_truth)


def test_a_replica_whose_engine_fails_does_not_come_up(planted):
    with pytest.raises(VerificationError, match="the unet fails first"):
        build_warm_engine(DeployConfig.load({**CONFIG, "verify": True}))


def test_random_weights_are_verified_in_the_precision_they_were_drawn_in():
    with pytest.raises(ConfigError, match="dtype"):
        mii_serve.verify.runs.refuse_other_weights("random-sd-v1-4", "fp16")
    mii_serve.verify.runs.refuse_other_weights("random-sd-v1-4", "fp32")
    mii_serve.verify.runs.refuse_other_weights("demo", "fp16")


def test_pictures_that_the_engine_refuses_are_listed_and_not_a_failure(short_truth):
    engine = native()
    check = engine.check

    def without_lcm(params):
        if params.scheduler == "lcm":
            raise InvalidRequestError("scheduler", "must be linear")
        return check(params)

    engine.check = without_lcm
    report = verify(engine, short_truth)
    assert report.is_passed
    [(name, reason)] = report.skipped.items()
    assert name.startswith("lcm") and "must be linear" in reason
    assert any("not drawn: scheduler: must be linear" in line for line in report.lines())


def test_an_engine_that_refuses_every_picture_fails(short_truth):
    engine = native()

    def refuse(params):
        raise InvalidRequestError("scheduler", "must be linear")

    engine.check = refuse
    failure = verify(engine, short_truth).first_failure
    assert failure.stage is Stage.PICTURES
    assert "none of the pictures" in failure.faults[0]

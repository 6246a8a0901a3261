"""The reference engine against `StableDiffusionPipeline.__call__` itself: the same bits for the same generator."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from samplers import USUAL

from mii_serve.samplers.names import SAMPLERS
from mii_serve.types import Picture


def with_sampler(pipeline, name: str):
    """A pipeline of the same parts with the sampler a user would put in by hand."""
    spec = SAMPLERS[name]
    parts = dict(pipeline.components)
    parts["scheduler"] = getattr(diffusers, spec.class_name).from_config(pipeline.scheduler.config, **spec.overrides)
    other = diffusers.StableDiffusionPipeline(**parts)
    other.set_progress_bar_config(disable=True)
    return other


def expected_picture(pipeline, *, seed: int = 3, scheduler: str = "pndm", **arguments) -> tuple[Image.Image, bool]:
    arguments = {"prompt": "a red circle on a blue background", "height": 64, "width": 64, **arguments}
    result = with_sampler(pipeline, scheduler)(generator=torch.Generator().manual_seed(seed), **arguments)
    return result.images[0], result.nsfw_content_detected[0]


def assert_same_bits(picture: Picture, expected: Image.Image) -> None:
    assert (picture.width, picture.height) == expected.size
    assert picture.rgb == expected.convert("RGB").tobytes()


@pytest.mark.parametrize("scheduler", ["pndm", "ddim", "euler_a", "dpm++_2m", "unipc", "heun"])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_every_sampler_with_and_without_guidance(pipeline, draw, scheduler, guidance_scale):
    arguments = {"scheduler": scheduler, "guidance_scale": guidance_scale, "num_inference_steps": 7}
    [(picture, _)] = draw(**arguments)
    expected, flag = expected_picture(pipeline, **arguments)
    assert_same_bits(picture, expected)
    assert picture.nsfw_content_detected is flag


@pytest.mark.parametrize("size", [{"height": 64, "width": 64}, {"height": 96, "width": 64}, {"height": 72, "width": 136}])
@pytest.mark.parametrize("negative_prompt", ["", "a green square, blurry"])
def test_sizes_and_negative_prompts(pipeline, draw, size, negative_prompt):
    arguments = {"num_inference_steps": 4, "guidance_scale": 5.0, "negative_prompt": negative_prompt, **size}
    [(picture, _)] = draw(scheduler="pndm", **arguments)
    expected, _ = expected_picture(pipeline, **arguments)
    assert_same_bits(picture, expected)


@pytest.mark.parametrize("scheduler", ["pndm", "euler_a"])
def test_image_i_is_the_pipelines_picture_for_seed_plus_i(pipeline, draw, scheduler):
    arguments = {"scheduler": scheduler, "num_inference_steps": 5, "guidance_scale": 3.0}
    pictures = draw(num_images_per_prompt=2, **arguments)
    for i, (picture, _) in enumerate(pictures):
        expected, _ = expected_picture(pipeline, seed=3 + i, **arguments)
        assert_same_bits(picture, expected)


def test_two_images_in_one_pipeline_call_differ_by_no_more_than_one_level(pipeline, draw):
    """The pipeline computes both in one batch, where the machine's kernels may sum in another order."""
    arguments = {"num_inference_steps": 8, "guidance_scale": 7.5}
    pictures = draw(scheduler="pndm", num_images_per_prompt=2, **arguments)
    generators = [torch.Generator().manual_seed(3 + i) for i in range(2)]
    result = pipeline(
        "a red circle on a blue background",
        height=64,
        width=64,
        num_images_per_prompt=2,
        generator=generators,
        **arguments,
    )
    for (picture, _), expected in zip(pictures, result.images, strict=True):
        ours = np.frombuffer(picture.rgb, np.uint8).astype(int).reshape(64, 64, 3)
        assert np.abs(ours - np.asarray(expected).astype(int)).max() <= 1


def test_the_same_request_twice_is_the_same_bits(draw):
    arguments = {"scheduler": "euler_a", "num_inference_steps": 6}
    assert draw(**arguments) == draw(**arguments)


def test_samples_side_by_side_do_not_touch_each_other(engine, draw):
    from mii_serve.types import RequestedParams, Sample, SampleId, StepPlan

    alone = [draw(seed=seed, num_inference_steps=steps, scheduler=name)[0][0] for seed, steps, name in TOGETHER]
    samples = [
        Sample(
            id=SampleId(f"r{seed}", 0),
            params=engine.capabilities.resolve(
                RequestedParams(
                    prompt="a red circle on a blue background", seed=seed, num_inference_steps=steps, scheduler=name
                ),
                fallback_seed=0,
            ),
        )
        for seed, steps, name in TOGETHER
    ]
    finished: dict[str, Picture] = {}
    running, joins = [sample.id for sample in samples], tuple(samples)
    while running:
        ended = []
        for progress in engine.run(StepPlan(joins=joins, steps=tuple(running))):
            if progress.step == progress.num_steps:
                running.remove(progress.id)
                ended.append(progress.id)
        for progress in engine.run(StepPlan(decodes=tuple(ended))):
            finished[progress.id.request_id] = progress.picture
        joins = ()
    assert [finished[sample.id.request_id] for sample in samples] == alone


TOGETHER = [(1, 5, "pndm"), (2, 3, "euler_a"), (3, 8, "dpm++_2m")]


def test_pndm_makes_one_call_more_than_it_has_steps(draw):
    assert draw(scheduler="pndm", num_inference_steps=10)[0][1] == 11


def test_seeds_beyond_63_bits_work(draw):
    assert draw(seed=2**64 - 1, num_inference_steps=1)[0][0] != draw(seed=0, num_inference_steps=1)[0][0]


@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize("num_inference_steps", [1, 2, 5])
def test_a_sampler_that_passed_the_check_draws_a_picture(engine, draw, name, num_inference_steps):
    from mii_serve.errors import InvalidRequestError
    from mii_serve.types import RequestedParams

    asked = {"scheduler": name, "num_inference_steps": num_inference_steps}
    try:
        engine.check(engine.capabilities.resolve(RequestedParams(prompt="p", **asked), fallback_seed=0))
    except InvalidRequestError:
        return
    [(picture, _)] = draw(**asked)
    assert len(picture.rgb) == 64 * 64 * 3


def test_a_long_prompt_is_cut_as_diffusers_cuts_it_and_the_rest_is_told(pipeline, draw):
    prompt = "a red circle on a blue background, " * 12
    [(picture, _)] = draw(prompt=prompt, num_inference_steps=2, scheduler="pndm", guidance_scale=3.0)
    expected, _ = expected_picture(pipeline, prompt=prompt, num_inference_steps=2, guidance_scale=3.0)
    assert_same_bits(picture, expected)
    assert picture.dropped_prompt
    assert picture.dropped_negative_prompt == ""
    assert prompt.replace(" ", "").replace(",", "").endswith(picture.dropped_prompt.replace(" ", "").replace(",", ""))


def test_a_prompt_that_fits_drops_nothing(draw):
    assert draw(num_inference_steps=1)[0][0].dropped_prompt == ""


@pytest.fixture
def checker_that_always_fires(pipeline, engine):
    """Both sides share nothing, so both are changed, and put back."""
    checkers = [pipeline.safety_checker, engine._pipeline.safety_checker]
    saved = [checker.concept_embeds_weights.clone() for checker in checkers]
    for checker in checkers:
        checker.concept_embeds_weights.data.fill_(-2.0)
    yield
    for checker, weights in zip(checkers, saved, strict=True):
        checker.concept_embeds_weights.data.copy_(weights)


@pytest.mark.usefixtures("checker_that_always_fires")
def test_a_flagged_picture_is_black_as_in_the_pipeline(pipeline, draw):
    [(picture, _)] = draw(num_inference_steps=2, scheduler="pndm", guidance_scale=3.0)
    expected, flag = expected_picture(pipeline, num_inference_steps=2, guidance_scale=3.0)
    assert flag is True
    assert picture.nsfw_content_detected is True
    assert picture.rgb == bytes(64 * 64 * 3)
    assert_same_bits(picture, expected)


def test_without_a_checker_the_flag_is_absent(engine, draw, monkeypatch):
    monkeypatch.setattr(engine._pipeline, "safety_checker", None)
    assert draw(num_inference_steps=1)[0][0].nsfw_content_detected is None

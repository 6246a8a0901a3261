"""Requests that start from an image, against `StableDiffusionImg2ImgPipeline` and `StableDiffusionInpaintPipeline`."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from drawing import finish
from PIL import Image, ImageDraw

from mii_serve.engine.batched.engine import BatchedEngine
from mii_serve.engine.factory import native_engine
from mii_serve.engine.reference import ReferenceEngine
from mii_serve.errors import InvalidRequestError
from mii_serve.samplers.build import ModelSchedulers
from mii_serve.samplers.run import SamplerRun
from mii_serve.samplers.sampling import Samplings, Uncompiled
from mii_serve.types import InputImage, RequestedParams, Sample, SampleId

REQUESTS = [
    # scheduler, num_inference_steps, strength, guidance_scale
    ("pndm", 10, 0.6, 3.0),
    ("euler", 7, 1.0, 1.0),
    ("euler_a", 9, 0.35, 3.0),
    ("heun", 8, 0.5, 3.0),
    ("dpm++_2m_karras", 12, 0.8, 7.5),
    ("dpm++_2m_sde", 10, 0.5, 3.0),
    ("unipc", 9, 0.7, 3.0),
    ("lcm", 4, 0.5, 1.5),
    ("ddim", 5, 0.2, 3.0),
]
MASKED = [
    ("pndm", 10, 0.6, 3.0),  # stepped by objects: where the latents are changed between the calls, it is in no table
    ("unipc", 8, 0.7, 3.0),  # the same
    ("euler", 7, 1.0, 1.0),
    ("euler_a", 9, 0.35, 3.0),
    ("heun", 8, 0.5, 3.0),
    ("dpm++_2m_karras", 12, 1.0, 7.5),
    ("ddim", 5, 0.8, 3.0),
]


def some_image(width: int = 64, height: int = 64) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    levels = np.stack([4 * x, 4 * y, 2 * (x + y)], axis=-1).astype(np.uint8)
    levels[height // 3 : height // 2, width // 4 : width // 2] = 255, 0, 0
    return Image.fromarray(levels)


def some_mask(width: int = 64, height: int = 64) -> Image.Image:
    mask = Image.new("L", (width, height), 40)
    ImageDraw.Draw(mask).ellipse((width // 6, height // 4, 2 * width // 3, 3 * height // 4), fill=200)
    return mask


def drawn_by_diffusers(model, request, image: Image.Image, seed: int, mask: Image.Image | None = None, **more) -> np.ndarray:
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    name, steps, strength, guidance_scale = request
    scheduler = ModelSchedulers(model.pipeline.scheduler)._template(name)
    pipeline_class = StableDiffusionImg2ImgPipeline if mask is None else StableDiffusionInpaintPipeline
    pipeline = pipeline_class(
        **{**model.pipeline.components, "scheduler": copy.deepcopy(scheduler)}, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    arguments = {"num_inference_steps": steps, "strength": strength, "guidance_scale": guidance_scale, **more}
    if mask is not None:
        arguments = {"height": 64, "width": 64, "mask_image": mask, **arguments}
    return np.asarray(pipeline("a red circle", image=image, generator=generator, **arguments).images[0]).astype(int)


def sample_of(engine, request, index: int, image: Image.Image | None, mask: Image.Image | None = None) -> Sample:
    name, steps, strength, guidance_scale = request
    asked = RequestedParams(
        prompt="a red circle",
        height=64,
        width=64,
        scheduler=name,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        seed=40 + index,
        image=None if image is None else b"its file",
        mask_image=None if mask is None else b"its file",
        strength=None if image is None else strength,
    )
    params = engine.capabilities.resolve(asked, fallback_seed=0)
    input_image = None if image is None else InputImage(rgb=image.tobytes(), mask=None if mask is None else mask.tobytes())
    return Sample(id=SampleId(f"r{index}", 0), params=params, input_image=input_image)


def levels(picture) -> np.ndarray:
    return np.frombuffer(picture.rgb, np.uint8).reshape(picture.height, picture.width, 3).astype(int)


@pytest.fixture(scope="module")
def expected(demo) -> list[np.ndarray]:
    return [drawn_by_diffusers(demo, request, some_image(), 40 + i) for i, request in enumerate(REQUESTS)]


@pytest.fixture(scope="module")
def masked(demo) -> list[np.ndarray]:
    return [drawn_by_diffusers(demo, request, some_image(), 40 + i, some_mask()) for i, request in enumerate(MASKED)]


@pytest.fixture(scope="module")
def native(demo):
    engine = native_engine(demo, max_slots=len(REQUESTS) + len(MASKED) + 4)
    yield engine
    engine.close()


def test_the_reference_makes_the_pipelines_picture_bit_for_bit(demo, expected, masked):
    engine = ReferenceEngine(demo)
    for i, request in enumerate(MASKED):
        one = sample_of(engine, request, i, some_image(), some_mask())
        assert np.array_equal(levels(finish(engine, one)[one.id][-1].picture), masked[i]), request
    for i, request in enumerate(REQUESTS):
        one = sample_of(engine, request, i, some_image())
        assert np.array_equal(levels(finish(engine, one)[one.id][-1].picture), expected[i]), request


def test_in_one_batch_with_all_kinds_of_requests_each_is_the_pipelines(native, expected, masked):
    with_image = [sample_of(native, request, i, some_image()) for i, request in enumerate(REQUESTS)]
    with_mask = [sample_of(native, request, i, some_image(), some_mask()) for i, request in enumerate(MASKED)]
    with_mask = [replace(one, id=SampleId(f"m{i}", 0)) for i, one in enumerate(with_mask)]
    without = [sample_of(native, request, 100 + i, None) for i, request in enumerate(REQUESTS[:4])]
    alone = [finish(native, one)[one.id][-1].picture for one in without]
    together = finish(native, *with_mask, *with_image, *without, late=1)
    true = [*masked, *expected, *map(levels, alone)]
    for one, picture in zip((*with_mask, *with_image, *without), true, strict=True):
        assert np.abs(levels(together[one.id][-1].picture) - picture).max() <= 1, one.params


def test_an_image_that_was_encoded_before_makes_the_same_picture(native, expected, masked):
    cases = [(REQUESTS[0], None, expected[0]), (REQUESTS[2], None, expected[2]), (MASKED[3], some_mask(), masked[3])]
    for request, mask, true in cases:
        one = sample_of(native, request, (REQUESTS if mask is None else MASKED).index(request), some_image(), mask)
        ahead = replace(one, encoded_image=native.encode_image(one.params, one.input_image))
        assert np.abs(levels(finish(native, ahead)[one.id][-1].picture) - true).max() <= 1, request


def test_where_the_mask_is_dark_the_image_stays(native):
    """As the VAE shows it: what is decoded is the image's latents there, whatever the prompt."""
    one = sample_of(native, ("euler", 6, 1.0, 7.5), 0, some_image(), Image.new("L", (64, 64), 127))
    other = sample_of(native, ("ddim", 3, 1.0, 1.0), 0, some_image(), Image.new("L", (64, 64), 0))
    pictures = [finish(native, each)[each.id][-1].picture for each in (one, other)]
    assert pictures[0].rgb == pictures[1].rgb


def test_a_scheduler_that_tables_do_not_hold_when_blended_has_a_table_without_a_mask(native):
    of = {has_mask: native._samplings.of(SamplerRun("pndm", 10, 4), is_blended=has_mask) for has_mask in (False, True)}
    assert isinstance(of[True], Uncompiled) and not isinstance(of[False], Uncompiled)


def test_a_scheduler_object_begins_where_the_pipelines_does(demo, monkeypatch):
    """As for samplers that are not linear: their samples are stepped by objects, in the same batch."""
    monkeypatch.setattr(
        Samplings, "of", lambda self, run, **_: Uncompiled(run.num_inference_steps - run.num_skipped_steps, "a test")
    )
    engine = native_engine(demo, max_slots=2)
    for i, request in enumerate([one for one in REQUESTS if one[0] in ("euler_a", "unipc")]):  # one call a step
        one = sample_of(engine, request, i, some_image())
        true = drawn_by_diffusers(demo, request, some_image(), 40 + i)
        assert np.abs(levels(finish(engine, one)[one.id][-1].picture) - true).max() <= 1, request
    engine.close()


def test_the_calls_are_those_of_the_steps_that_are_left(native):
    assert native.check(sample_of(native, ("euler", 10, 0.55, 3.0), 0, some_image()).params) == 5
    assert native.check(sample_of(native, ("heun", 8, 0.5, 3.0), 0, some_image()).params) == 7, (
        "the last step is of first order"
    )


@pytest.mark.parametrize("which", ["native", "reference"])
def test_a_scheduler_that_cannot_add_noise_is_refused(demo, native: BatchedEngine, which):
    engine = native if which == "native" else ReferenceEngine(demo)
    with pytest.raises(InvalidRequestError, match=r"scheduler: must be one that can add noise to an image"):
        engine.check(sample_of(engine, ("ipndm", 6, 0.5, 1.0), 0, some_image()).params)

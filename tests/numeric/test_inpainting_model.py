"""Inpainting models, whose UNet takes in a mask and the rest of the image, against `StableDiffusionInpaintPipeline`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel
from drawing import finish
from PIL import Image
from test_image_to_image import drawn_by_diffusers, levels, sample_of, some_image, some_mask

from mii_serve.config import LimitsConfig
from mii_serve.engine.batched.buckets import BatchShape
from mii_serve.engine.batched.engine import BatchedEngine
from mii_serve.engine.factory import native_engine
from mii_serve.engine.reference import ReferenceEngine
from mii_serve.errors import InvalidRequestError
from mii_serve.models import LoadedModel, load_model
from mii_serve.types import RequestedParams

REQUESTS = [
    # scheduler, num_inference_steps, strength, guidance_scale
    ("pndm", 9, 1.0, 3.0),
    ("pndm", 10, 0.6, 1.0),
    ("euler", 7, 1.0, 1.0),
    ("euler_a", 9, 0.5, 3.0),
    ("heun", 6, 0.7, 7.5),
    ("dpm++_2m_karras", 10, 1.0, 7.5),
    ("unipc", 8, 0.8, 3.0),
    ("ipndm", 6, 1.0, 3.0),  # adds no noise to an image, and has not to
]


def inputs(i: int) -> tuple[Image.Image, Image.Image]:
    """Another image and another mask for each."""
    return some_image().rotate(90 * i), some_mask().rotate(90 * i).resize((64, 64))


@pytest.fixture(scope="module")
def model(demo: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The demo model with five more channels, from a folder as people have it."""
    parts = dict(demo.pipeline.components)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**parts["unet"].config, "in_channels": 9})
    tensors = copy.deepcopy(parts["unet"].state_dict())
    own = tensors["conv_in.weight"]
    tensors["conv_in.weight"] = torch.cat([own, 0.1 * torch.randn(own.shape[0], 5, *own.shape[2:])], dim=1)
    unet.load_state_dict(tensors)
    folder: Path = tmp_path_factory.mktemp("inpainting")
    StableDiffusionInpaintPipeline(**{**parts, "unet": unet}, requires_safety_checker=False).save_pretrained(folder)
    return load_model(str(folder), revision=None, dtype="fp32", device="cpu", limits=LimitsConfig())


@pytest.fixture(scope="module")
def expected(model: LoadedModel) -> list[np.ndarray]:
    return [drawn_by_diffusers(model, one, *_swapped(i), mask=inputs(i)[1]) for i, one in enumerate(REQUESTS)]


def _swapped(i: int) -> tuple[Image.Image, int]:
    return inputs(i)[0], 40 + i


@pytest.fixture(scope="module")
def native(model: LoadedModel) -> Iterator[BatchedEngine]:
    engine = native_engine(model, max_slots=len(REQUESTS))
    yield engine
    engine.close()


def test_the_reference_makes_the_pipelines_picture_bit_for_bit(model, expected):
    engine = ReferenceEngine(model)
    engine.warmup()
    for i, request in enumerate(REQUESTS):
        one = sample_of(engine, request, i, *inputs(i))
        assert np.array_equal(levels(finish(engine, one)[one.id][-1].picture), expected[i]), request


def test_in_one_batch_each_is_the_pipelines(native, expected):
    native.warmup()
    samples = [sample_of(native, request, i, *inputs(i)) for i, request in enumerate(REQUESTS)]
    together = finish(native, *samples, late=1)
    for one, picture in zip(samples, expected, strict=True):
        assert np.abs(levels(together[one.id][-1].picture) - picture).max() <= 1, one.params


def test_an_image_that_was_encoded_before_makes_the_same_picture(native, expected):
    for i in (0, 1):
        one = sample_of(native, REQUESTS[i], i, *inputs(i))
        ahead = replace(one, encoded_image=native.encode_image(one.params, one.input_image))
        assert np.abs(levels(finish(native, ahead)[one.id][-1].picture) - expected[i]).max() <= 1


def test_padded_to_a_bucket_it_is_the_same(model, expected):
    engine = native_engine(model, max_slots=2, buckets=[BatchShape(2, 4, 8, 8)])
    engine.warmup()
    one = sample_of(engine, REQUESTS[0], 0, *inputs(0))
    assert np.abs(levels(finish(engine, one)[one.id][-1].picture) - expected[0]).max() <= 1
    engine.close()


@pytest.mark.parametrize(("more", "field"), [({}, "image"), ({"image": b"its file"}, "mask_image")])
def test_a_request_without_an_image_or_a_mask_is_refused_by_name(native, more, field):
    with pytest.raises(InvalidRequestError, match="this model repaints") as refusal:
        native.capabilities.resolve(RequestedParams(prompt="a", **more), fallback_seed=0)
    assert refusal.value.field == field

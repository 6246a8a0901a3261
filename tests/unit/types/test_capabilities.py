"""What a request may ask for, rule by rule."""

from __future__ import annotations

import math

import pytest

from mii_serve.errors import InvalidRequestError
from mii_serve.types import MAX_SEED, Capabilities, GenerationDefaults, ImageFormat, Limits, OutputOptions, RequestedParams

CAPABILITIES = Capabilities(
    limits=Limits(),
    defaults=GenerationDefaults(scheduler="dpm++_2m", num_inference_steps=20, guidance_scale=3.0, height=64, width=128),
    schedulers={"pndm": "pndm", "PNDMScheduler": "pndm", "dpm++_2m": "dpm++_2m"},
)


def resolve(**asked):
    return CAPABILITIES.resolve(RequestedParams(**{"prompt": "a red circle", **asked}), fallback_seed=7)


def test_what_is_left_out_gets_the_models_defaults():
    params = resolve()
    assert (params.scheduler, params.num_inference_steps, params.guidance_scale) == ("dpm++_2m", 20, 3.0)
    assert (params.height, params.width, params.num_images_per_prompt) == (64, 128, 1)
    assert (params.negative_prompt, params.seed) == ("", 7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", " \n\t"),
        ("prompt", "x" * 4097),
        ("prompt", "x" * 100_000),
        ("prompt", "\ud800"),
        ("prompt", None),
        ("prompt", ["a", "b"]),
        ("negative_prompt", "x" * 4097),
        ("negative_prompt", "\udfff"),
        ("height", 63),
        ("height", 56),
        ("height", 1032),
        ("height", -64),
        ("width", 0),
        ("width", 100),
        ("width", 64.0),
        ("num_inference_steps", 0),
        ("num_inference_steps", -5),
        ("num_inference_steps", 1001),
        ("num_inference_steps", True),
        ("guidance_scale", math.nan),
        ("guidance_scale", math.inf),
        ("guidance_scale", -math.inf),
        ("guidance_scale", -0.1),
        ("guidance_scale", 50.001),
        ("guidance_scale", "7"),
        ("num_images_per_prompt", 0),
        ("num_images_per_prompt", 17),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("seed", 1.0),
        ("scheduler", "ddimm"),
        ("scheduler", ""),
    ],
)
def test_a_broken_rule_names_its_field(field, value):
    with pytest.raises(InvalidRequestError) as caught:
        resolve(**{field: value})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", "x" * 4096),
        ("prompt", "漢字 ü 🎨 \x00"),
        ("height", 1024),
        ("num_inference_steps", 1000),
        ("guidance_scale", 0),
        ("guidance_scale", 50),
        ("num_images_per_prompt", 16),
        ("seed", 0),
        ("seed", MAX_SEED),
    ],
)
def test_the_edges_of_every_rule_are_inside(field, value):
    assert getattr(resolve(**{field: value}), field) == value


def test_a_scheduler_is_answered_with_its_short_name():
    assert resolve(scheduler="PNDMScheduler").scheduler == "pndm"
    assert resolve(scheduler="PNDM").scheduler == "pndm"


def test_image_seeds_count_up_and_wrap():
    params = resolve(seed=MAX_SEED, num_images_per_prompt=2)
    assert [params.seed_of(i) for i in range(2)] == [MAX_SEED, 0]


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("output.quality", {"format": ImageFormat.JPEG, "quality": 0, "embed_metadata": False}),
        ("output.quality", {"format": ImageFormat.JPEG, "quality": 101, "embed_metadata": False}),
        ("output.quality", {"format": ImageFormat.PNG, "quality": 90, "embed_metadata": False}),
        ("output.embed_metadata", {"format": ImageFormat.JPEG, "quality": None, "embed_metadata": True}),
    ],
)
def test_output_options_that_do_not_go_together_are_refused(field, options):
    with pytest.raises(InvalidRequestError) as caught:
        OutputOptions.checked(**options)
    assert caught.value.field == field


def test_prompts_stay_out_of_repr():
    asked = RequestedParams(prompt="a secret", negative_prompt="another secret")
    assert "secret" not in repr(asked)
    assert "secret" not in repr(CAPABILITIES.resolve(asked, fallback_seed=0))

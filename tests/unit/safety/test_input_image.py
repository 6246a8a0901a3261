"""Images of callers: what is read, in which size, and what is refused by name."""

from __future__ import annotations

import pytest
from image_files import GOOD, REFUSED, TRANSPARENT, file_of, some
from PIL import Image

from mii_serve.errors import InvalidRequestError
from mii_serve.safety.input_image import resolve_with_image
from mii_serve.types import MAX_IMAGE_BYTES, Capabilities, GenerationDefaults, Limits, RequestedParams

CAPABILITIES = Capabilities(
    limits=Limits(), defaults=GenerationDefaults(scheduler="pndm", height=512, width=512), schedulers={"pndm": "pndm"}
)


def resolved(file: bytes, **asked):
    return resolve_with_image(CAPABILITIES, RequestedParams(prompt="a", image=file, **asked), fallback_seed=1)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_the_pixels_are_those_of_the_file(mode):
    image = some(mode)
    params, found = resolved(file_of(image))
    assert (params.width, params.height, params.strength) == (96, 80, 0.8)
    assert found.rgb == image.convert("RGB").tobytes()


def test_transparency_that_hides_nothing_is_no_transparency():
    image = some()
    assert resolved(file_of(image.convert("RGBA")))[1].rgb == image.tobytes()


def test_a_size_that_is_left_out_is_the_images_rounded_down_as_diffusers_does():
    from diffusers.image_processor import VaeImageProcessor

    image = some(size=(101, 79))
    params, found = resolved(file_of(image))
    assert (params.width, params.height) == (96, 72)
    true = VaeImageProcessor(vae_scale_factor=8).preprocess(image)
    assert found.rgb == ((true[0] + 1) / 2 * 255).round().byte().permute(1, 2, 0).numpy().tobytes()


def test_a_size_that_is_named_resizes_an_image_of_any_size():
    params, found = resolved(file_of(some(size=(2000, 1500))), height=64, width=128)
    assert (params.width, params.height, len(found.rgb)) == (128, 64, 128 * 64 * 3)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_not_as_its_sender_sees_it_is_refused_by_the_fields_name(name):
    file, rule = REFUSED[name]
    with pytest.raises(InvalidRequestError, match=rule) as refusal:
        resolved(file)
    assert refusal.value.field == "image"


@pytest.mark.parametrize(
    ("asked", "field", "rule"),
    [
        ({"strength": 1.1}, "strength", r"must be a finite number in \[0, 1\]"),
        ({"strength": float("nan")}, "strength", "finite"),
        ({"strength": 0.09, "num_inference_steps": 10}, "strength", "at least 1 / num_inference_steps, here 0.1"),
        ({"strength": 0.0}, "strength", "no step would be made"),
        ({"height": 100}, "height", "multiple of 8"),
    ],
)
def test_parameters_that_do_not_go_with_an_image_are_refused(asked, field, rule):
    with pytest.raises(InvalidRequestError, match=rule) as refusal:
        resolved(GOOD, **asked)
    assert refusal.value.field == field


def test_strength_is_for_requests_with_an_image():
    with pytest.raises(InvalidRequestError, match="strength: is for requests with an image only"):
        CAPABILITIES.resolve(RequestedParams(prompt="a", strength=0.5), fallback_seed=1)


def test_a_mask_is_resized_and_made_grey_as_diffusers_does():
    image, mask = some(size=(101, 79)), some(size=(101, 79))
    params, found = resolved(file_of(image), mask_image=file_of(mask))
    assert (params.strength, params.has_mask) == (1.0, True)
    assert found.mask == mask.resize((96, 72), Image.Resampling.LANCZOS).convert("L").tobytes()


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        (file_of(some(size=(95, 80))), "must have the image's size, 96 × 80 pixels, got 95 × 80"),
        (file_of(TRANSPARENT), "transparent"),
        (b"no file", "readable"),
        (GOOD + bytes(MAX_IMAGE_BYTES - len(GOOD)), "together with the image"),
    ],
    ids=["another size", "transparent", "no image", "too large together"],
)
def test_a_mask_is_refused_by_its_own_name(mask, rule):
    with pytest.raises(InvalidRequestError, match=rule) as refusal:
        resolved(GOOD, mask_image=mask)
    assert refusal.value.field == "mask_image"


def test_a_mask_is_for_requests_with_an_image():
    with pytest.raises(InvalidRequestError, match="mask_image: is for requests with an image only"):
        CAPABILITIES.resolve(RequestedParams(prompt="a", mask_image=b"x"), fallback_seed=1)

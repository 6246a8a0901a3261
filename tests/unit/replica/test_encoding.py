"""Pictures as files: pixels unharmed where the format allows it, metadata only where asked for."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace

import pytest
from fake_engine import FakeEngine
from PIL import Image

from mii_serve.provenance import Provenance
from mii_serve.provenance.marks import PNG_XMP
from mii_serve.provenance.report import report_on
from mii_serve.replica.encoding import encode_picture
from mii_serve.types import PARAMETER_NAMES, EffectiveParameters, ImageFormat, OutputOptions, Picture, RequestedParams

RGB = random.Random(0).randbytes(24 * 16 * 3)
PICTURE = Picture(width=24, height=16, rgb=RGB, nsfw_content_detected=False)
ENGINE = FakeEngine()
PARAMS = ENGINE.capabilities.resolve(
    RequestedParams(prompt='a "red" circle\nünïcödé', negative_prompt="blurry", seed=5, num_images_per_prompt=3),
    fallback_seed=0,
)
EFFECTIVE = EffectiveParameters.of(PARAMS, ENGINE.description, ENGINE.describe_scheduler(PARAMS))


def encode(**output) -> bytes:
    return encode_picture(PICTURE, OutputOptions(**output), EFFECTIVE, seed=7, provenance=Provenance())


def test_png_and_raw_keep_every_pixel():
    assert Image.open(io.BytesIO(encode())).tobytes() == RGB
    assert encode(format=ImageFormat.RAW_RGB) == RGB


@pytest.mark.parametrize("image_format", [ImageFormat.JPEG, ImageFormat.WEBP])
def test_quality_makes_lossy_files_smaller(image_format):
    assert len(encode(format=image_format, quality=10)) < len(encode(format=image_format, quality=95))
    assert Image.open(io.BytesIO(encode(format=image_format))).size == (24, 16)


def test_metadata_tells_programs_and_people_how_the_picture_was_made():
    texts = Image.open(io.BytesIO(encode(embed_metadata=True))).text
    told = json.loads(texts["mii_serve"])
    assert (told["prompt"], told["seed"], told["num_images_per_prompt"]) == (PARAMS.prompt, 7, 1)
    assert (told["engine"], told["model"]) == ("fake", "fake")
    assert (told["scheduler_class"], told["scheduler_options"]) == ("PNDMScheduler", {"skip_prk_steps": "true"})
    assert texts["parameters"] == (
        'a "red" circle\nünïcödé\nNegative prompt: blurry\n'
        "Steps: 4, Sampler: pndm, CFG scale: 7.5, Seed: 7, Size: 64x64, Model: fake"
    )


def test_metadata_says_nothing_of_the_host():
    note = "not deepspeed: no nvcc; pip install --force-reinstall /home/op/wheels/deepspeed.whl"
    engine = replace(ENGINE.description, note=note, device="cuda:3")
    parameters = EffectiveParameters.of(PARAMS, engine, ENGINE.describe_scheduler(PARAMS))
    file = encode_picture(PICTURE, OutputOptions(embed_metadata=True), parameters, seed=7, provenance=Provenance())
    texts = Image.open(io.BytesIO(file)).text
    assert set(texts) == {"mii_serve", "parameters", PNG_XMP}
    assert set(json.loads(texts["mii_serve"])) == {
        *(name for name in PARAMETER_NAMES if name not in ("clip_skip", "eta", "prompt_syntax")),  # they are not used
        *("engine", "dtype", "model", "model_revision"),
        *("scheduler_class", "scheduler_options"),
    }
    assert not any(word in text for word in ("/home", "cuda", "deepspeed") for text in texts.values())


def test_without_being_asked_a_file_tells_its_origin_alone():
    texts = Image.open(io.BytesIO(encode())).text
    assert list(texts) == [PNG_XMP] and PARAMS.prompt not in texts[PNG_XMP]
    off = Provenance(has_metadata=False)
    assert not Image.open(io.BytesIO(encode_picture(PICTURE, OutputOptions(), EFFECTIVE, seed=7, provenance=off))).text


def test_a_flagged_picture_stays_black_under_the_watermark():
    black = Picture(width=256, height=256, rgb=bytes(256 * 256 * 3), nsfw_content_detected=True)
    file = encode_picture(black, OutputOptions(), EFFECTIVE, seed=7, provenance=Provenance(has_watermark=True))
    with Image.open(io.BytesIO(file)) as image:
        assert image.getextrema() == ((0, 0),) * 3
    report = report_on(file, "black")
    assert report.is_marked and report.xmp.model == "fake" and not report.watermark.is_found

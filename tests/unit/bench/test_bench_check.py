"""What passes for the reference's picture, and which pictures are looked at."""

from __future__ import annotations

import io
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scripted_server import all_events, colour

from mii_serve.bench.check import LocalReference, PictureSample, SampledPicture, Tolerance, check, distance
from mii_serve.bench.mix import parse_mix
from mii_serve.bench.values import Answer, ReceivedPicture, Record
from mii_serve.errors import InvalidRequestError
from mii_serve.types import MAX_SEED, gather

MIX = parse_mix("1: num_inference_steps=1; 1: num_inference_steps=2")


def painted(level: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def encoded(image: Image.Image) -> ReceivedPicture:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return ReceivedPicture(encoded=buffer.getvalue())


class Painter:
    """A reference whose every picture is the same."""

    name = "painter"

    def __init__(self, picture: Image.Image) -> None:
        self._picture = picture

    def picture(self, request, image_index):
        return self._picture


def verdict(sent: ReceivedPicture, reference: Image.Image, **tolerance):
    return check(
        [SampledPicture(request=MIX.request("0", 0), image_index=0, picture=sent)], Painter(reference), Tolerance(**tolerance)
    )


def test_distance_by_hand():
    assert distance(painted(10), painted(10)) == (0, math.inf)
    levels, psnr_db = distance(painted(10), painted(12))
    assert (levels, psnr_db) == (2, pytest.approx(10 * math.log10(255**2 / 4)))
    one_pixel = np.full((16, 16, 3), 10, np.uint8)
    one_pixel[3, 4, 1] = 250
    levels, psnr_db = distance(painted(10), Image.fromarray(one_pixel))
    assert (levels, psnr_db) == (240, pytest.approx(10 * math.log10(255**2 * 768 / 240**2)))


def test_one_level_off_passes_and_two_do_not():
    assert verdict(encoded(painted(100)), painted(101)).is_ok
    assert verdict(encoded(painted(101)), painted(100)).is_ok
    assert verdict(encoded(painted(100)), painted(102)).is_ok is False
    assert verdict(encoded(painted(0)), painted(255)).is_ok is False


def test_half_precision_may_be_near_instead():
    assert Tolerance.of("fp32") == Tolerance.of(None) == Tolerance(max_levels=1, min_psnr_db=None)
    assert Tolerance.of("fp16").min_psnr_db == Tolerance.of("bf16").min_psnr_db == 30.0
    assert verdict(encoded(painted(100)), painted(104), min_psnr_db=30.0).is_ok  # 36 dB
    assert verdict(encoded(painted(100)), painted(140), min_psnr_db=30.0).is_ok is False  # 16 dB


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (encoded(painted(100, (8, 16))), "it is 8x16, the reference's 16x16"),
        (ReceivedPicture(encoded=b"nothing"), "cannot identify image file"),
        (ReceivedPicture(encoded=bytes(5), raw_size=(16, 16)), "not enough image data"),
    ],
)
def test_what_cannot_be_compared_is_wrong_and_says_why(sent, why):
    found = verdict(sent, painted(100))
    assert found.is_ok is False
    assert why in found.pictures[0].text


def test_a_request_that_the_reference_refuses_is_wrong():
    class Refusing(Painter):
        def picture(self, request, image_index):
            raise InvalidRequestError("scheduler", "must be another")

    kept = [SampledPicture(request=MIX.request("0", 0), image_index=0, picture=encoded(painted(0)))]
    found = check(kept, Refusing(painted(0)), Tolerance())
    assert found.is_ok is False
    assert found.pictures[0].text == "scheduler: must be another"


def test_one_wrong_picture_among_many_is_enough():
    kept = [SampledPicture(request=MIX.request("0", i), image_index=0, picture=encoded(painted(100))) for i in range(3)]
    kept.append(SampledPicture(request=MIX.request("0", 3), image_index=0, picture=encoded(painted(103))))
    assert check(kept, Painter(painted(100)), Tolerance()).is_ok is False
    assert check(kept[:3], Painter(painted(100)), Tolerance()).is_ok is True


def test_without_pictures_nothing_is_claimed():
    assert check([], Painter(painted(0)), Tolerance()).is_ok is None


def answered(sampler: PictureSample, index: int, kind: str, code: str = "OK") -> None:
    request = MIX.request("0", index)
    picture = ReceivedPicture(encoded=index.to_bytes(3, "big"), raw_size=(1, 1))
    record = Record(index=index, kind=kind, num_images=1, intended_s=0, sent_s=0, ended_s=1, code=code)
    object.__setattr__(request, "kind", kind)
    sampler(request, Answer(code=code, pictures=(picture,)), record)


def test_every_kind_is_looked_at_and_each_request_with_the_same_chance():
    places: Counter[int] = Counter()
    for seed in range(300):
        sampler = PictureSample(4, 2, str(seed))
        for index in range(40):
            answered(sampler, index, "rare" if index % 20 == 0 else "common")
        kept = Counter(one.request.kind for one in sampler.pictures)
        assert kept == {"rare": 2, "common": 2}
        places.update(one.request.index for one in sampler.pictures if one.request.kind == "common")
    early = sum(count for index, count in places.items() if index < 20)
    assert early / sum(places.values()) == pytest.approx(0.5, abs=0.08)


def test_only_what_went_well_is_kept_and_nothing_when_nothing_is_wanted():
    sampler, none = PictureSample(4, 1, "0"), PictureSample(0, 1, "0")
    answered(sampler, 0, "k", "UNAVAILABLE")
    answered(none, 0, "k")
    assert sampler.pictures == none.pictures == []


def test_the_reference_makes_one_image_of_a_request_with_that_images_seed():
    asked = []

    class Local:
        def generate(self, request):
            asked.append(request)
            return gather(all_events(request))

    reference = LocalReference(Local(), "some/model")
    request = MIX.request("0", 0)
    request = replace(request, asked=replace(request.asked, seed=MAX_SEED, num_images_per_prompt=3))
    picture = reference.picture(request, 2)
    assert (picture.size, picture.getpixel((0, 0))) == ((16, 8), colour(0))
    assert (asked[0].params.seed, asked[0].params.num_images_per_prompt) == (1, 1)
    assert reference.name == "reference fp32, r1"

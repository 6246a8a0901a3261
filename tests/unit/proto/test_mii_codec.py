"""MII's messages: numbers as their callers wrote them, and both generations of the request."""

from __future__ import annotations

import math
import random
import struct

import numpy as np
import pytest

from mii_serve.errors import InvalidRequestError
from mii_serve.proto.mii import pictures_pb2 as mii
from mii_serve.proto.mii_codec import encode_mii_reply, encode_mii_request, parse_mii_request
from mii_serve.types import ImageFormat, ImageReady
from mii_serve.types.tensors import shortest_decimal


def as_float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def test_a_float_is_the_shortest_decimal_that_its_32_bits_stand_for():
    for written in (7.3, 7.1, 0.1, 7.5, 1e-3, 12.34567, 1e30, 0.0, -7.3, 16777216.0):
        assert shortest_decimal(as_float32(written)) == written
    generator = random.Random(0)
    for _ in range(2000):
        wire = struct.unpack("<f", generator.randbytes(4))[0]
        if math.isfinite(wire):
            assert shortest_decimal(wire) == float(str(np.float32(wire)))
            assert as_float32(shortest_decimal(wire)) == wire


def test_every_guidance_scale_with_two_decimals_arrives_as_written():
    for hundredths in range(5001):
        assert shortest_decimal(as_float32(hundredths / 100)) == hundredths / 100


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), 1e300])
def test_what_is_no_32_bit_number_stays_what_it_is(value):
    assert shortest_decimal(value) == value


def test_nan_stays_nan():
    assert math.isnan(shortest_decimal(float("nan")))


def test_a_request_is_read_as_it_was_written():
    kwargs = {"seed": 2**63 - 1, "guidance_scale": 7.3, "scheduler": "ddim", "seedy": True}
    read = parse_mii_request(encode_mii_request(["a", "ü"], ["", "b"], kwargs).SerializeToString())
    assert (list(read.prompts), list(read.negative_prompts), dict(read.kwargs)) == (["a", "ü"], ["", "b"], kwargs)
    assert "ü" not in repr(read)


@pytest.mark.parametrize("value", [None, [1], 2**63, b"a", "\ud800"])
def test_what_the_wire_cannot_carry_is_refused_by_name(value):
    with pytest.raises(InvalidRequestError) as caught:
        encode_mii_request(["a"], [], {"seed": value})
    assert caught.value.field == "seed"


@pytest.mark.parametrize("prompts", ["\ud800", 5])
def test_a_prompt_that_is_no_text_is_refused(prompts):
    with pytest.raises(InvalidRequestError):
        encode_mii_request([prompts], [], {})


def entry(**fields) -> bytes:
    return mii.KwargEntry(**fields).SerializeToString()


@pytest.mark.parametrize(
    "second",
    [
        [entry(key="seed")],
        [entry(value=mii.Value(ivalue=1))],
        [entry(key="seed", value=mii.Value(ivalue=1)) + b"\x1a\x00"],
        [entry(key="seed", value=mii.Value(ivalue=1)), b""],
        [entry(key="seed", value=mii.Value(ivalue=1)), b"blurry"],
    ],
)
def test_what_is_not_wholly_a_map_is_negative_prompts(second):
    message = mii.PictureRequest(prompt=["a"] * len(second), second=second)
    assert len(parse_mii_request(message.SerializeToString()).negative_prompts) == len(second)


def test_a_request_with_a_third_field_is_never_of_the_old_generation():
    message = mii.PictureRequest(prompt=["a"], second=[entry(key="seed", value=mii.Value(ivalue=1))])
    message.query_kwargs["seed"].ivalue = 5
    read = parse_mii_request(message.SerializeToString())
    assert (dict(read.kwargs), len(read.negative_prompts)) == ({"seed": 5}, 1)


@pytest.mark.parametrize("num_bytes", [0, 1, 127, 128, 16383, 16384, 3 * 512 * 512])
def test_a_reply_put_together_by_hand_is_what_protobuf_would_write(num_bytes):
    pixels = [random.Random(i).randbytes(num_bytes) for i in range(3)]
    flags = (None, False, True)
    images = [
        ImageReady(
            image_index=i,
            encoded=data,
            format=ImageFormat.RAW_RGB,
            width=16,
            height=8,
            seed=i,
            nsfw_content_detected=flag,
        )
        for i, (data, flag) in enumerate(zip(pixels, flags, strict=True))
    ]
    whole = mii.ImageReply(
        images=pixels, nsfw_content_detected=[False, False, True], mode="RGB", size_w=16, size_h=8, time_taken=1.5
    )
    assert encode_mii_reply(images, 1.5) == whole.SerializeToString()

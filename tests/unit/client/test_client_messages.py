"""The pure functions: what is refused before a call, and what is made of an answer."""

from __future__ import annotations

import math
from typing import Any

import pytest
from scripted_server import all_pictures, done, effective, encoded, image, queued

from mii_serve.client.messages import Gathering, build_request, check_bound, check_timeout, decode_response
from mii_serve.errors import InvalidRequestError, MiiServeError
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.types import ImageFormat

NOTHING: dict[str, Any] = {
    "negative_prompt": None,
    "num_inference_steps": None,
    "guidance_scale": None,
    "seed": None,
    "height": None,
    "width": None,
    "num_images_per_prompt": None,
    "scheduler": None,
    "output_format": "png",
    "quality": None,
    "embed_metadata": False,
}


def test_what_is_left_out_stays_absent() -> None:
    request = build_request("a", **NOTHING)
    assert {field.name for field, _ in request.ListFields()} == {"prompt", "output"}
    assert request.output == pb.OutputOptions(format=pb.IMAGE_FORMAT_PNG, embed_metadata=False)


def test_what_is_said_travels_exactly() -> None:
    said = {
        "negative_prompt": "",
        "num_inference_steps": 20,
        "guidance_scale": 7.3,
        "seed": 2**64 - 1,
        "height": 512,
        "width": 640,
        "num_images_per_prompt": 3,
        "scheduler": "ddim",
    }
    request = build_request("a", **{**NOTHING, **said, "output_format": "jpeg", "quality": 80})
    assert {name: getattr(request, name) for name in said} == said
    assert request.HasField("negative_prompt")
    assert (request.output.format, request.output.quality) == (pb.IMAGE_FORMAT_JPEG, 80)


@pytest.mark.parametrize(
    ("changed", "field", "rule"),
    [
        ({"prompt": ["a", "b"]}, "prompt", "one call for each prompt"),
        ({"prompt": 3}, "prompt", "must be text"),
        ({"prompt": "\ud800"}, "prompt", "Unicode"),
        ({"num_inference_steps": "20"}, "num_inference_steps", "whole number"),
        ({"num_inference_steps": True}, "num_inference_steps", "whole number"),
        ({"seed": -1}, "seed", "64-bit"),
        ({"seed": 2**64}, "seed", "64-bit"),
        ({"output_format": "gif"}, "output_format", "png, jpeg, webp, raw_rgb"),
        ({"quality": 80}, "output.quality", "JPEG and WebP only"),
        ({"output_format": "webp", "embed_metadata": True}, "output.embed_metadata", "PNG only"),
    ],
)
def test_what_no_message_can_carry_is_refused_by_name(changed: dict[str, Any], field: str, rule: str) -> None:
    with pytest.raises(InvalidRequestError, match=rule) as caught:
        build_request(**{"prompt": "a", **NOTHING, **changed})
    assert caught.value.field == field


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf, True, "5"])
def test_a_timeout_is_a_finite_number_above_zero(timeout: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_timeout(timeout)
    assert caught.value.field == "timeout"


def test_a_timeout_may_be_left_out_or_be_longer_than_grpc_can_count() -> None:
    assert check_timeout(None) is None
    assert check_timeout(2) == 2.0
    assert check_timeout(1e300) == 365 * 86400
    with pytest.raises(InvalidRequestError):
        check_bound(None)  # type: ignore[arg-type]


def test_images_come_out_in_index_order() -> None:
    request = pb.GenerateRequest(prompt="a", num_images_per_prompt=2, output=pb.OutputOptions(format=1))
    parts = [image(request, index).image for index in (1, 0)]
    answer = pb.GenerateResponse(request_id="r", images=parts, parameters=effective(request))
    assert [picture.getpixel((0, 0)) for picture in decode_response(answer).images] == [(200, 0, 10), (200, 40, 10)]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"data": b"not a picture"}, "cannot be read as PNG"),
        ({"data": encoded(ImageFormat.PNG)[:48]}, "cannot be read as PNG"),
        ({"data": encoded(ImageFormat.JPEG)}, "cannot be read as PNG"),
        ({"width": 17}, "announced as 17x8"),
        ({"format": pb.IMAGE_FORMAT_RAW_RGB}, "cannot be read as RAW_RGB"),
        ({"format": 77}, "number 77"),
        ({"index": 1}, r"images \[1\] of 1"),
    ],
)
def test_a_damaged_answer_is_an_error_and_not_a_wrong_picture(changed: dict[str, Any], reason: str) -> None:
    request = pb.GenerateRequest(prompt="a", output=pb.OutputOptions(format=1))
    part = image(request, 0).image
    for name, value in changed.items():
        setattr(part, name, value)
    answer = pb.GenerateResponse(request_id="r", images=[part], parameters=effective(request))
    with pytest.raises(MiiServeError, match=reason):
        decode_response(answer)


def test_a_stream_without_its_end_has_no_result() -> None:
    gathering = Gathering()
    for message in list(all_pictures(pb.GenerateRequest(output=pb.OutputOptions(format=1))))[:-1]:
        gathering.take(message)
    with pytest.raises(MiiServeError, match="ended before"):
        gathering.result()


def test_a_stream_that_lost_an_image_has_no_result() -> None:
    gathering = Gathering()
    request = pb.GenerateRequest(num_images_per_prompt=2, output=pb.OutputOptions(format=1))
    for message in (queued(), image(request, 1), done(effective(request))):
        gathering.take(message)
    with pytest.raises(MiiServeError, match=r"images \[1\] of 2"):
        gathering.result()


def test_an_event_of_a_newer_server_is_passed_over() -> None:
    assert Gathering().take(pb.GenerateEvent(request_id="r")) is None


def test_prompts_stay_out_of_repr() -> None:
    request = pb.GenerateRequest(prompt="a secret", negative_prompt="a worry", output=pb.OutputOptions(format=1))
    parameters = effective(request)
    parameters.dropped_prompt = "a tail"
    answer = pb.GenerateResponse(images=[image(request, 0).image], parameters=parameters)
    shown = repr(decode_response(answer))
    assert not any(text in shown for text in ("secret", "worry", "tail"))

"""Messages and values say the same thing, in both directions, and malformed messages get typed errors."""

from __future__ import annotations

import grpc
import pytest
from fake_engine import FakeEngine
from google.protobuf.message import DecodeError

from mii_serve.errors import (
    ContentBlockedError,
    EngineError,
    InvalidRequestError,
    ModerationFailedError,
    QueueFullError,
    UnavailableError,
)
from mii_serve.proto.codec import (
    Activity,
    decode_capabilities,
    decode_request,
    encode_event,
    encode_request,
    encode_server_info,
    gather_response,
)
from mii_serve.proto.status import decode_error, encode_error
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.types import (
    Done,
    Effective,
    ImageFormat,
    ImageReady,
    OutputOptions,
    Priority,
    Queued,
    RequestedParams,
    SchedulerDescription,
    Started,
    Step,
)

CAPABILITIES = FakeEngine().capabilities


def decode(message):
    return decode_request(message, CAPABILITIES, fallback_seed=3)


def test_a_request_survives_the_wire():
    asked = RequestedParams(
        prompt="ein Kreis",
        negative_prompt="blurry",
        height=128,
        width=64,
        num_inference_steps=7,
        guidance_scale=7.3,
        num_images_per_prompt=2,
        scheduler="pndm",
        seed=2**64 - 1,
    )
    output = OutputOptions(format=ImageFormat.WEBP, quality=80, preview_every=5)
    wire = encode_request(asked, output, Priority.LOW).SerializeToString()
    params, received_output, priority = decode(pb.GenerateRequest.FromString(wire))
    assert (received_output, priority) == (output, Priority.LOW)
    assert {name: getattr(params, name) for name in asked.__slots__} == {name: getattr(asked, name) for name in asked.__slots__}
    assert decode(encode_request(params, output, priority)) == (params, output, priority), (
        "the replica reads what the front has read"
    )


def test_zero_is_not_the_same_as_absent():
    message = pb.GenerateRequest(prompt="p", num_inference_steps=0)
    with pytest.raises(InvalidRequestError, match="num_inference_steps"):
        decode(message)
    assert decode(pb.GenerateRequest(prompt="p", seed=0))[0].seed == 0
    assert decode(pb.GenerateRequest(prompt="p"))[0].seed == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("height", 2**40),
        ("seed", -1),
        ("seed", 2**64),
        ("guidance_scale", "seven"),
        ("prompt", 5),
        ("prompt", "\ud800"),
        ("num_inference_steps", 2.5),
        ("num_inference_steps", True),
        ("guidance_scale", True),
    ],
)
def test_a_value_without_a_place_on_the_wire_names_its_field(field, value):
    with pytest.raises(InvalidRequestError) as caught:
        encode_request(RequestedParams(**{"prompt": "p", field: value}), OutputOptions())
    assert caught.value.field == field


def test_fields_of_a_newer_protocol_are_refused_by_number():
    wire = pb.GenerateRequest(prompt="p").SerializeToString() + b"\xf8\x07\x01"  # field 127 = 1
    with pytest.raises(InvalidRequestError, match="127"):
        decode(pb.GenerateRequest.FromString(wire))


def test_an_unknown_image_format_is_refused():
    message = pb.GenerateRequest(prompt="p", output=pb.OutputOptions(format=77))
    with pytest.raises(InvalidRequestError, match=r"output\.format"):
        decode(message)


def test_invalid_utf8_is_refused_by_the_message_itself():
    with pytest.raises(DecodeError):
        pb.GenerateRequest.FromString(b"\x0a\x02\xff\xfe")


def test_every_event_is_its_own_kind_even_when_all_zero():
    assert encode_event("r", Queued(num_samples_ahead=0)).WhichOneof("event") == "queued"
    assert encode_event("r", Started(image_index=0)).WhichOneof("event") == "started"
    assert encode_event("r", Step(image_index=0, step=1, num_steps=2)).WhichOneof("event") == "step"


def test_a_stream_amounts_to_the_unary_answer():
    params, *_ = decode(pb.GenerateRequest(prompt="p", num_images_per_prompt=2))
    images = [
        ImageReady(
            image_index=i,
            encoded=bytes([i]),
            format=ImageFormat.PNG,
            height=64,
            width=64,
            seed=i,
            nsfw_content_detected=None if i else False,
        )
        for i in (1, 0)
    ]
    effective = Effective(
        params=params,
        engine=FakeEngine().description,
        scheduler=SchedulerDescription(class_name="PNDMScheduler", options={"steps_offset": "1"}, is_compiled=True),
        dropped_prompt="the rest",
    )
    events = [Queued(num_samples_ahead=1), *images, Done(effective=effective, queued_s=1.0, total_s=2.0)]
    response = gather_response(encode_event("r", event) for event in events)
    assert [image.index for image in response.images] == [0, 1]
    assert response.images[0].HasField("nsfw_content_detected")
    assert not response.images[1].HasField("nsfw_content_detected"), "no checker: absent, not false"
    assert response.request_id == "r"
    assert response.parameters.dropped_prompt == "the rest"
    told = response.parameters
    assert (told.scheduler_class, told.scheduler_options["steps_offset"], told.is_scheduler_compiled) == (
        "PNDMScheduler",
        "1",
        True,
    )
    assert (response.parameters.engine, response.timings.total_s) == ("fake", 2.0)


def test_capabilities_survive_the_wire():
    engine = FakeEngine()
    activity = Activity(**dict.fromkeys(Activity.__dataclass_fields__, 1))
    message = encode_server_info(
        version="1",
        deployment_name="d",
        engine=engine.description,
        capabilities=engine.capabilities,
        default_scheduler=SchedulerDescription(class_name="PNDMScheduler", options={}, is_compiled=True),
        activity=activity,
    )
    assert decode_capabilities(pb.GetServerInfoResponse.FromString(message.SerializeToString())) == engine.capabilities


@pytest.mark.parametrize("error", [InvalidRequestError("seed", "must be small", "9"), QueueFullError("x"), EngineError("y")])
def test_an_error_is_raised_again_on_the_other_side(error):
    code, text, trailing = encode_error(error)
    again = decode_error(code, text, trailing)
    assert (type(again), str(again)) == (type(error), str(error))


def test_damaged_details_do_not_hide_the_error():
    trailing = (("grpc-status-details-bin", b"\xff\xff\xff"),)
    assert isinstance(decode_error(grpc.StatusCode.INVALID_ARGUMENT, "bad", trailing), InvalidRequestError)


def test_a_status_without_details_still_has_a_type():
    assert isinstance(decode_error(grpc.StatusCode.UNAVAILABLE, "gone", None), UnavailableError)
    assert isinstance(decode_error(grpc.StatusCode.INVALID_ARGUMENT, "bad", ()), InvalidRequestError)
    assert str(decode_error(grpc.StatusCode.UNKNOWN, "", None)) == "UNKNOWN"


@pytest.mark.parametrize("stage", ["input", "output"])
def test_what_content_safety_refused_survives_the_wire(stage):
    error = ContentBlockedError("negative_prompt", {"Hate": 6, "Violence": 4}, stage=stage, on_blocklist=True)
    code, text, trailing = encode_error(error)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    again = decode_error(code, text, trailing)
    assert isinstance(again, ContentBlockedError)
    assert (again.field, again.stage, again.categories, again.on_blocklist) == (
        "negative_prompt",
        stage,
        {"Hate": 6, "Violence": 4},
        True,
    )
    assert str(again) == str(error) == "negative_prompt: refused by content safety: Hate 6, Violence 4, a blocklist"


def test_no_verdict_is_an_error_of_its_own():
    again = decode_error(*encode_error(ModerationFailedError("content safety did not answer in time")))
    assert type(again) is ModerationFailedError and again.http_status == 424
    assert again.grpc_code == "UNAVAILABLE"

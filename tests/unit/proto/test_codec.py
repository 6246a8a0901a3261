"""Messages and values say the same thing, in both directions, and malformed messages get typed errors."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import MappingProxyType

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
    decode_answer,
    decode_event,
    decode_request,
    decode_resolved,
    decode_server_info,
    encode_answer,
    encode_event,
    encode_request,
    encode_server_info,
)
from mii_serve.proto.status import decode_error, encode_error
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.types import (
    Activity,
    Done,
    EffectiveParameters,
    GenerationRequest,
    ImageFormat,
    ImageReady,
    OutputOptions,
    Preview,
    Priority,
    PromptEmbeds,
    Queued,
    ReplicaInfo,
    RequestedParams,
    ResolvedRequest,
    Restarted,
    SchedulerDescription,
    ServerInfo,
    Started,
    Step,
    gather,
)

CAPABILITIES = FakeEngine().capabilities


def decode(message):
    """The parameters that a message means."""
    return CAPABILITIES.resolve(decode_request(message).params, fallback_seed=3)


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
        clip_skip=2,
        eta=0.25,
        prompt_syntax="a1111",
        timesteps=(999, 0),
        sigmas=(14.615, 0.0),
        prompt_embeds=PromptEmbeds(num_tokens=1, width=2, dtype="fp16", data=b"1234"),
    )
    output = OutputOptions(format=ImageFormat.WEBP, quality=80, preview_every=5)
    request = GenerationRequest(params=asked, output=output, priority=Priority.LOW)
    wire = encode_request(request).SerializeToString()
    assert decode_request(pb.GenerateRequest.FromString(wire)) == request


def test_what_is_left_out_stays_open():
    request = GenerationRequest(params=RequestedParams(prompt="p"))
    assert decode_request(encode_request(request)) == request


def test_a_resolved_request_survives_the_wire():
    asked = RequestedParams(prompt="p", guidance_scale=7.3, clip_skip=1, sigmas=(7.3, 0.0))
    params = CAPABILITIES.resolve(asked, fallback_seed=2**64 - 1)
    request = ResolvedRequest(params=params, output=OutputOptions(quality=None, embed_metadata=True), priority=Priority.HIGH)
    assert decode_resolved(pb.GenerateRequest.FromString(encode_request(request).SerializeToString())) == request


def test_zero_is_not_the_same_as_absent():
    message = pb.GenerateRequest(prompt="p", num_inference_steps=0)
    with pytest.raises(InvalidRequestError, match="num_inference_steps"):
        decode(message)
    assert decode(pb.GenerateRequest(prompt="p", seed=0)).seed == 0
    assert decode(pb.GenerateRequest(prompt="p")).seed == 3


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
        encode_request(GenerationRequest(params=RequestedParams(**{"prompt": "p", field: value})))
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


RESOLVED = CAPABILITIES.resolve(RequestedParams(prompt="p", num_images_per_prompt=2), fallback_seed=3)
PARAMETERS = EffectiveParameters.of(
    RESOLVED,
    FakeEngine().description,
    SchedulerDescription(class_name="PNDMScheduler", options={"steps_offset": "1"}, is_compiled=True),
    dropped_prompt="the rest",
)


def image(index: int, **flags) -> ImageReady:
    return ImageReady(
        image_index=index, encoded=bytes([index]), format=ImageFormat.PNG, height=64, width=64, seed=index, **flags
    )


EVENTS = [
    Queued(num_samples_ahead=0),
    Queued(num_samples_ahead=2, estimated_wait_s=0.0),
    Started(image_index=0),
    Step(image_index=0, step=1, num_steps=2),
    Step(image_index=1, step=2, num_steps=2, estimated_left_s=0.0),
    Restarted(image_indexes=(0, 3)),
    Preview(image_index=0, step=1, encoded=b"x", format=ImageFormat.WEBP, height=64, width=128),
    Preview(image_index=0, step=1, encoded=b"", format=ImageFormat.PNG, height=64, width=64, nsfw_content_detected=False),
    image(0),
    image(1, nsfw_content_detected=False, moderation_blocked=True),
    Done(parameters=PARAMETERS, queued_s=0.0, total_s=2.0),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_every_event_survives_the_wire_even_when_all_zero(event):
    wire = encode_event("r", event).SerializeToString()
    message = pb.GenerateEvent.FromString(wire)
    assert message.request_id == "r" and decode_event(message) == event


def test_an_event_of_a_newer_server_is_none():
    assert decode_event(pb.GenerateEvent(request_id="r")) is None


def test_an_answer_survives_the_wire_by_index():
    images = [image(1), image(0, nsfw_content_detected=False)]
    answer = gather([Queued(num_samples_ahead=1), *images, Done(parameters=PARAMETERS, queued_s=1.0, total_s=2.0)])
    message = encode_answer("r", answer)
    assert [one.index for one in message.images] == [0, 1]
    assert message.images[0].HasField("nsfw_content_detected")
    assert not message.images[1].HasField("nsfw_content_detected"), "no checker: absent, not false"
    assert message.request_id == "r" and message.parameters.dropped_prompt == "the rest"
    assert decode_answer(pb.GenerateResponse.FromString(message.SerializeToString())) == answer


def test_events_that_end_early_are_no_answer():
    with pytest.raises(ValueError, match="before the request is done"):
        gather([image(0)])


def test_a_servers_description_survives_the_wire():
    one, most = (Activity(**dict.fromkeys(Activity.__dataclass_fields__, number)) for number in (1, 7))
    info = ServerInfo(
        version="1",
        deployment_name="d",
        model="m",
        model_revision="0",
        engine="native",
        dtype="fp32",
        device="cpu",
        has_safety_checker=True,
        defaults=CAPABILITIES.defaults,
        limits=CAPABILITIES.limits,
        schedulers=CAPABILITIES.schedulers,
        activity=one,
        default_scheduler_options={"a": "1"},
        needs_mask=True,
    ).with_replicas(
        [
            ReplicaInfo(index=0, is_ready=True, num_restarts=0, activity=one, devices=("cpu, 1 thread", "cpu, 2 threads")),
            ReplicaInfo(index=1, is_ready=False, num_restarts=2, activity=None),
            ReplicaInfo(index=2, is_ready=True, num_restarts=0, activity=most),
        ]
    )
    assert decode_server_info(pb.GetServerInfoResponse.FromString(encode_server_info(info).SerializeToString())) == info
    assert (info.activity.num_images, info.activity.uptime_s, info.activity.max_cells_per_call) == (8, 7, 1)
    assert info.capabilities == replace(CAPABILITIES, needs_mask=True)


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


def test_parameters_are_json_even_where_an_engine_shares_its_options():
    """An engine hands out a read-only view of its scheduler's options."""
    scheduler = SchedulerDescription(class_name="A", options=MappingProxyType({"a": "1"}), is_compiled=True)
    parameters = EffectiveParameters.of(RESOLVED, FakeEngine().description, scheduler)
    assert json.loads(json.dumps(asdict(parameters)))["scheduler_options"] == {"a": "1"}

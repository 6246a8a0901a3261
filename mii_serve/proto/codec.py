"""Message ⇄ value for both ends of the server. What a caller reads out of an answer is in `client/messages.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mii_serve.errors import InvalidRequestError
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.types import (
    Capabilities,
    Done,
    Effective,
    EngineDescription,
    Event,
    GenerationDefaults,
    GenerationParams,
    ImageFormat,
    ImageReady,
    Limits,
    OutputOptions,
    Preview,
    Priority,
    Queued,
    RequestedParams,
    Started,
    Step,
)

MAX_MESSAGE_BYTES = 128 * 1024 * 1024
"""Bound on one message, on both sides: sixteen raw 1024 × 1024 pictures are 48 MiB."""

MAX_REQUEST_BYTES = 1024 * 1024
"""Bound on a request at the server; far above what any valid request needs."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)

GET_METRICS = "/replica.Internal/GetMetrics"
"""Empty in, Prometheus text out; on a replica's private socket only, so no part of the public service."""

_FORMATS: dict[ImageFormat, pb.ImageFormat] = {
    ImageFormat.PNG: pb.IMAGE_FORMAT_PNG,
    ImageFormat.JPEG: pb.IMAGE_FORMAT_JPEG,
    ImageFormat.WEBP: pb.IMAGE_FORMAT_WEBP,
    ImageFormat.RAW_RGB: pb.IMAGE_FORMAT_RAW_RGB,
}
_FORMAT_OF = {number: image_format for image_format, number in _FORMATS.items()}
_PRIORITIES: dict[Priority, pb.Priority] = {
    Priority.HIGH: pb.PRIORITY_HIGH,
    Priority.NORMAL: pb.PRIORITY_NORMAL,
    Priority.LOW: pb.PRIORITY_LOW,
}
_PRIORITY_OF = {number: priority for priority, number in _PRIORITIES.items()}
_OPTIONAL_FIELDS = (
    "negative_prompt",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "num_images_per_prompt",
    "scheduler",
    "seed",
)


def image_format_number(image_format: ImageFormat) -> pb.ImageFormat:
    """The format's number on the wire."""
    return _FORMATS[image_format]


def image_format_of(number: pb.ImageFormat) -> ImageFormat:
    """The format with this number on the wire; one that a server wrote."""
    return _FORMAT_OF[number]


# ---- requests ----------------------------------------------------------------------------------------------------


def encode_request(
    asked: RequestedParams | GenerationParams, output: OutputOptions, priority: Priority | None = None
) -> pb.GenerateRequest:
    """Write a request; what is None stays absent.

    Raises:
        InvalidRequestError: a value that has no place in its field, such as a number beyond 64 bits or text for a number.
    """
    message = pb.GenerateRequest(output=pb.OutputOptions(format=_FORMATS[output.format]))
    if priority is not None:
        message.priority = _PRIORITIES[priority]
    for name in ("prompt", *_OPTIONAL_FIELDS):
        _put(message, name, getattr(asked, name))
    _put(message.output, "quality", output.quality)
    _put(message.output, "embed_metadata", output.embed_metadata)
    _put(message.output, "preview_every", output.preview_every)
    return message


def _put(message: pb.GenerateRequest | pb.OutputOptions, name: str, value: object) -> None:
    if value is None:
        return
    try:
        if isinstance(value, bool) is not (_kind(message, name) == _FIELD.TYPE_BOOL):
            raise TypeError
        setattr(message, name, value)
    except (TypeError, ValueError, UnicodeError):
        rule = f"must fit the field's type, {_TYPE_NAMES[_kind(message, name)]}"
        raise InvalidRequestError(name, rule, _shown(value)) from None


def _kind(message: pb.GenerateRequest | pb.OutputOptions, name: str) -> int:
    return message.DESCRIPTOR.fields_by_name[name].type


def _shown(value: object) -> str:
    return repr(value)[:80] if isinstance(value, int | float | str) else type(value).__name__


_FIELD = type(pb.GenerateRequest.DESCRIPTOR.fields[0])
_TYPE_NAMES = {
    _FIELD.TYPE_STRING: "valid Unicode text",
    _FIELD.TYPE_INT32: "a 32-bit whole number",
    _FIELD.TYPE_UINT64: "an unsigned 64-bit whole number",
    _FIELD.TYPE_DOUBLE: "a number",
    _FIELD.TYPE_BOOL: "true or false",
}


def decode_request(
    message: pb.GenerateRequest, capabilities: Capabilities, *, fallback_seed: int
) -> tuple[GenerationParams, OutputOptions, Priority]:
    """The one decode of a request; afterwards nothing is open and nothing needs checking.

    Raises:
        InvalidRequestError: naming the field and the rule it breaks.
    """
    if unknown := _unknown_field_numbers(message):
        raise InvalidRequestError("request", "has fields this server does not know", f"field numbers {unknown}")
    asked = RequestedParams(
        prompt=message.prompt,
        **{name: getattr(message, name) for name in _OPTIONAL_FIELDS if message.HasField(name)},
    )
    params = capabilities.resolve(asked, fallback_seed=fallback_seed)
    return params, _decode_output(message.output), _decode_priority(message.priority)


def _unknown_field_numbers(message: pb.GenerateRequest) -> list[int]:
    from google.protobuf.unknown_fields import UnknownFieldSet

    found: set[int] = set()
    for part in (message, message.output):
        fields = UnknownFieldSet(part)
        found.update(fields[i].field_number for i in range(len(fields)))
    return sorted(found)


def _decode_output(message: pb.OutputOptions) -> OutputOptions:
    number = message.format or pb.IMAGE_FORMAT_PNG
    if number not in _FORMAT_OF:
        raise InvalidRequestError("output.format", f"must be one of {', '.join(pb.ImageFormat.keys()[1:])}", str(number))
    return OutputOptions.checked(
        format=_FORMAT_OF[number],
        quality=message.quality if message.HasField("quality") else None,
        embed_metadata=message.embed_metadata,
        preview_every=message.preview_every if message.HasField("preview_every") else None,
    )


def _decode_priority(number: pb.Priority) -> Priority:
    number = number or pb.PRIORITY_NORMAL
    if number not in _PRIORITY_OF:
        raise InvalidRequestError("priority", f"must be one of {', '.join(pb.Priority.keys()[1:])}", str(number))
    return _PRIORITY_OF[number]


# ---- answers -----------------------------------------------------------------------------------------------------


def encode_event(request_id: str, event: Event) -> pb.GenerateEvent:
    message = pb.GenerateEvent(request_id=request_id)
    match event:
        case Queued():
            message.queued.CopyFrom(
                pb.GenerateEvent.Queued(num_samples_ahead=event.num_samples_ahead, estimated_wait_s=event.estimated_wait_s)
            )
        case Started():
            message.started.CopyFrom(pb.GenerateEvent.Started(image_index=event.image_index))
        case Step():
            message.step.CopyFrom(
                pb.GenerateEvent.Step(
                    image_index=event.image_index,
                    step=event.step,
                    num_steps=event.num_steps,
                    estimated_left_s=event.estimated_left_s,
                )
            )
        case Preview():
            message.preview.CopyFrom(
                pb.GenerateEvent.Preview(
                    image_index=event.image_index,
                    step=event.step,
                    data=event.encoded,
                    format=_FORMATS[event.format],
                    height=event.height,
                    width=event.width,
                    nsfw_content_detected=event.nsfw_content_detected,
                )
            )
        case ImageReady():
            message.image.CopyFrom(_encode_image(event))
        case Done():
            message.done.parameters.CopyFrom(_encode_effective(event.effective))
            message.done.timings.CopyFrom(pb.Timings(queued_s=event.queued_s, total_s=event.total_s))
    return message


def _encode_image(event: ImageReady) -> pb.GeneratedImage:
    return pb.GeneratedImage(
        index=event.image_index,
        data=event.encoded,
        format=_FORMATS[event.format],
        height=event.height,
        width=event.width,
        seed=event.seed,
        nsfw_content_detected=event.nsfw_content_detected,
    )


def _encode_effective(effective: Effective) -> pb.EffectiveParameters:
    params, engine = effective.params, effective.engine
    return pb.EffectiveParameters(
        **{name: getattr(params, name) for name in GenerationParams.__dataclass_fields__},
        engine=engine.engine,
        dtype=engine.dtype,
        device=engine.device,
        model=engine.model,
        model_revision=engine.model_revision,
        dropped_prompt=effective.dropped_prompt,
        dropped_negative_prompt=effective.dropped_negative_prompt,
    )


def gather_response(events: Iterable[pb.GenerateEvent]) -> pb.GenerateResponse:
    """The unary answer that a complete stream of events amounts to."""
    response = pb.GenerateResponse()
    for event in events:
        kind = event.WhichOneof("event")
        if kind == "image":
            response.images.append(event.image)
        elif kind == "done":
            response.request_id = event.request_id
            response.parameters.CopyFrom(event.done.parameters)
            response.timings.CopyFrom(event.done.timings)
    response.images.sort(key=lambda image: image.index)
    return response


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """Counts since the replica started; the fields of the message of the same name."""

    uptime_s: float
    max_slots: int
    num_running: int
    num_waiting: int
    num_steps: int
    num_images: int
    num_requests: int
    num_cancelled_requests: int
    num_turns: int
    num_graph_misses: int
    max_cells_per_call: int | None


def encode_server_info(
    *, version: str, deployment_name: str, engine: EngineDescription, capabilities: Capabilities, activity: Activity
) -> pb.GetServerInfoResponse:
    limits, defaults = capabilities.limits, capabilities.defaults
    info = pb.GetServerInfoResponse
    return info(
        version=version,
        deployment_name=deployment_name,
        model=engine.model,
        model_revision=engine.model_revision,
        engine=engine.engine,
        dtype=engine.dtype,
        device=engine.device,
        has_safety_checker=engine.has_safety_checker,
        engine_note=engine.note,
        defaults=info.Defaults(**{name: getattr(defaults, name) for name in GenerationDefaults.__dataclass_fields__}),
        limits=info.Limits(**{name: getattr(limits, name) for name in Limits.__dataclass_fields__}),
        schedulers=capabilities.schedulers,
        activity=info.Activity(**{name: getattr(activity, name) for name in Activity.__dataclass_fields__}),
    )


def decode_capabilities(message: pb.GetServerInfoResponse) -> Capabilities:
    return Capabilities(
        limits=Limits(**{name: getattr(message.limits, name) for name in Limits.__dataclass_fields__}),
        defaults=GenerationDefaults(
            **{name: getattr(message.defaults, name) for name in GenerationDefaults.__dataclass_fields__}
        ),
        schedulers=dict(message.schedulers),
    )

"""Message ⇄ value of the service `mii_serve.v1`: each message is written in one place and read in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from mii_serve.errors import InvalidRequestError, MiiServeError
from mii_serve.proto.conditioning import conditioning_of, own_steps_of, put_conditioning
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.types import (
    EMBEDS,
    MAX_IMAGE_BYTES,
    NO_LORAS,
    OWN_STEPS,
    PARAMETER_NAMES,
    Activity,
    Done,
    EffectiveParameters,
    Event,
    GenerationAnswer,
    GenerationDefaults,
    GenerationParams,
    GenerationRequest,
    ImageFormat,
    ImageReady,
    InputImage,
    Limits,
    LoraChoice,
    LoraInfo,
    ModelParts,
    OutputOptions,
    Preview,
    Priority,
    Queued,
    ReplicaInfo,
    RequestedParams,
    ResolvedRequest,
    Restarted,
    ServerInfo,
    Started,
    Step,
)

MAX_MESSAGE_BYTES = 128 * 1024 * 1024
"""Bound on one message, on both sides: sixteen raw 1024 × 1024 images are 48 MiB."""

MAX_REQUEST_BYTES = 1024 * 1024 + MAX_IMAGE_BYTES
"""Bound on a request at the server; beside its files far above what any valid request needs."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)

MAX_NAMED_FIELDS = 5
"""Of unknown fields: an error's text is metadata, and has a bound."""

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
    Priority.BATCH: pb.PRIORITY_BATCH,
}
_PRIORITY_OF = {number: priority for priority, number in _PRIORITIES.items()}

Value = TypeVar("Value")


def well_formed(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A parser that refuses bytes that are no message.

    gRPC ends a call whose parser raises `DecodeError` as UNKNOWN, with a traceback in the log.
    """

    def checked(wire: bytes) -> Any:
        try:
            return parse(wire)
        except DecodeError:
            raise InvalidRequestError("request", "must be a well-formed message with valid UTF-8 text") from None

    return checked


def unknown_field_numbers(*messages: Message) -> list[int]:
    """Numbers of fields in these messages that this version does not have."""
    found: set[int] = set()
    for message in messages:
        unknown = UnknownFieldSet(message)
        found.update(unknown[i].field_number for i in range(len(unknown)))
    return sorted(found)


def _optional(message: Message, name: str) -> Any:
    """The field's value; None where it is absent."""
    return getattr(message, name) if message.HasField(name) else None


def _all_fields(message: Message, value_type: type[Value]) -> Value:
    """The value whose fields are the message's."""
    return value_type(**{one.name: getattr(message, one.name) for one in fields(value_type)})  # type: ignore[arg-type]


# ---- requests ----------------------------------------------------------------------------------------------------


def encode_request(request: GenerationRequest | ResolvedRequest) -> pb.GenerateRequest:
    """Write a request; parameters that are None stay absent. The `input_image` of a resolved one is left out.

    Raises:
        InvalidRequestError: a value that has no place in its field, such as a number beyond 64 bits or text for a number.
    """
    output = request.output
    message = pb.GenerateRequest(output=pb.OutputOptions(format=_FORMATS[output.format]))
    if request.priority is not Priority.NORMAL:
        message.priority = _PRIORITIES[request.priority]
    for name in (*PARAMETER_NAMES, "strength"):
        _put(message, name, getattr(request.params, name))
    put_conditioning(message, request.params)
    if isinstance(request.params, RequestedParams):
        _put(message, "image", request.params.image)
        _put(message, "mask_image", request.params.mask_image)
    _put_loras(message, request.params.loras or {})
    for name in ("quality", "embed_metadata", "preview_every"):
        _put(message.output, name, getattr(output, name))
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


def _put_loras(message: pb.GenerateRequest, loras: Mapping[str, float]) -> None:
    try:
        message.loras.update(loras)
    except (TypeError, ValueError, AttributeError, UnicodeError):
        raise InvalidRequestError("loras", "must be names of LoRAs with their scales", type(loras).__name__) from None


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
    _FIELD.TYPE_BYTES: "the bytes of a file",
}


def decode_request(message: pb.GenerateRequest) -> GenerationRequest:
    """Read a caller's request. What it leaves out is still open afterwards.

    Raises:
        InvalidRequestError: a field that this version does not have, or output options that break a rule.
    """
    if unknown := unknown_field_numbers(message, message.output, message.prompt_embeds, message.negative_prompt_embeds):
        raise InvalidRequestError(
            "request", "has fields this server does not know", f"field numbers {unknown[:MAX_NAMED_FIELDS]}"
        )
    names = (*PARAMETER_NAMES, "image", "mask_image", "strength")
    asked = {name: _optional(message, name) for name in names if name != "prompt"}
    asked |= conditioning_of(message)
    return GenerationRequest(
        params=RequestedParams(prompt=message.prompt, loras=dict(message.loras) or None, **asked),
        output=_decode_output(message.output),
        priority=_decode_priority(message.priority),
    )


def decode_resolved(
    message: pb.GenerateRequest,
    input_image: InputImage | None = None,
    lora_choice: LoraChoice = NO_LORAS,
    *,
    embeds_guidance: bool = False,
) -> ResolvedRequest:
    """Read a resolved request that this package wrote. Nothing is checked again. `embeds_guidance` is the model's."""
    values = {name: getattr(message, name) for name in PARAMETER_NAMES}
    values |= {name: _optional(message, name) for name in ("strength", "clip_skip")}
    values |= conditioning_of(message)
    return ResolvedRequest(
        params=GenerationParams(
            **values,
            has_mask=input_image is not None and input_image.mask is not None,
            loras=_sorted(message.loras),
            lora_choice=lora_choice,
            embeds_guidance=embeds_guidance,
        ),
        output=_decode_output(message.output),
        priority=_decode_priority(message.priority),
        input_image=input_image,
    )


def _decode_output(message: pb.OutputOptions) -> OutputOptions:
    number = message.format or pb.IMAGE_FORMAT_PNG
    if number not in _FORMAT_OF:
        raise InvalidRequestError("output.format", f"must be one of {', '.join(pb.ImageFormat.keys()[1:])}", str(number))
    return OutputOptions.checked(
        format=_FORMAT_OF[number],
        quality=_optional(message, "quality"),
        embed_metadata=message.embed_metadata,
        preview_every=_optional(message, "preview_every"),
    )


def _decode_priority(number: pb.Priority) -> Priority:
    number = number or pb.PRIORITY_NORMAL
    if number not in _PRIORITY_OF:
        raise InvalidRequestError("priority", f"must be one of {', '.join(pb.Priority.keys()[1:])}", str(number))
    return _PRIORITY_OF[number]


# ---- events and answers ------------------------------------------------------------------------------------------


def encode_event(request_id: str, event: Event) -> pb.GenerateEvent:
    message = pb.GenerateEvent(request_id=request_id)
    fill_event(message, event)
    return message


def fill_event(message: pb.GenerateEvent, event: Event) -> None:
    """Write an event into an empty message, which may be part of another: so that its image is copied once."""
    match event:
        case Step():
            step = message.step
            step.image_index, step.step, step.num_steps = event.image_index, event.step, event.num_steps
            if event.estimated_left_s is not None:
                step.estimated_left_s = event.estimated_left_s
        case Started():
            message.started.SetInParent()
            message.started.image_index = event.image_index
        case Queued():
            message.queued.SetInParent()
            message.queued.num_samples_ahead = event.num_samples_ahead
            if event.estimated_wait_s is not None:
                message.queued.estimated_wait_s = event.estimated_wait_s
        case Restarted():
            message.restarted.SetInParent()
            message.restarted.image_indexes.extend(event.image_indexes)
        case Preview():
            message.preview.image_index, message.preview.step = event.image_index, event.step
            _fill_image(message.preview, event)
        case ImageReady():
            _fill_ready(message.image, event)
        case Done():
            _fill_parameters(message.done.parameters, event.parameters)
            message.done.timings.queued_s, message.done.timings.total_s = event.queued_s, event.total_s


def decode_event(message: pb.GenerateEvent) -> Event | None:
    """The event in a message; None for a kind that only a newer server knows.

    Raises:
        MiiServeError: an image has a format that only a newer server knows.
    """
    match message.WhichOneof("event"):
        case "step":
            step = message.step
            return Step(
                image_index=step.image_index,
                step=step.step,
                num_steps=step.num_steps,
                estimated_left_s=_optional(step, "estimated_left_s"),
            )
        case "started":
            return Started(image_index=message.started.image_index)
        case "queued":
            queued = message.queued
            return Queued(num_samples_ahead=queued.num_samples_ahead, estimated_wait_s=_optional(queued, "estimated_wait_s"))
        case "restarted":
            return Restarted(image_indexes=tuple(message.restarted.image_indexes))
        case "preview":
            preview = message.preview
            return Preview(
                image_index=preview.image_index,
                step=preview.step,
                encoded=preview.data,
                format=_decode_format(preview.format, preview.image_index),
                height=preview.height,
                width=preview.width,
                nsfw_content_detected=_optional(preview, "nsfw_content_detected"),
            )
        case "image":
            return _decode_image(message.image)
        case "done":
            return _decode_done(message.done.parameters, message.done.timings)
        case _:
            return None


def encode_answer(request_id: str, answer: GenerationAnswer) -> pb.GenerateResponse:
    message = pb.GenerateResponse(request_id=request_id)
    for image in answer.images:
        _fill_ready(message.images.add(), image)
    _fill_parameters(message.parameters, answer.parameters)
    message.timings.queued_s, message.timings.total_s = answer.done.queued_s, answer.done.total_s
    return message


def decode_answer(message: pb.GenerateResponse) -> GenerationAnswer:
    """Raises:
    MiiServeError: an image has a format that only a newer server knows.
    """
    images = sorted((_decode_image(image) for image in message.images), key=lambda image: image.image_index)
    return GenerationAnswer(images=tuple(images), done=_decode_done(message.parameters, message.timings))


def _fill_ready(message: pb.GeneratedImage, image: ImageReady) -> None:
    message.index, message.seed = image.image_index, image.seed
    if image.moderation_blocked is not None:
        message.moderation_blocked = image.moderation_blocked
    _fill_image(message, image)


def _fill_image(message: pb.GeneratedImage | pb.GenerateEvent.Preview, image: ImageReady | Preview) -> None:
    message.data, message.format = image.encoded, _FORMATS[image.format]
    message.height, message.width = image.height, image.width
    if image.nsfw_content_detected is not None:
        message.nsfw_content_detected = image.nsfw_content_detected


def _decode_image(message: pb.GeneratedImage) -> ImageReady:
    return ImageReady(
        image_index=message.index,
        encoded=message.data,
        format=_decode_format(message.format, message.index),
        height=message.height,
        width=message.width,
        seed=message.seed,
        nsfw_content_detected=_optional(message, "nsfw_content_detected"),
        moderation_blocked=_optional(message, "moderation_blocked"),
    )


def _decode_format(number: pb.ImageFormat, index: int) -> ImageFormat:
    if number not in _FORMAT_OF:
        raise MiiServeError(f"image {index} has a format this client does not know, number {number}")
    return _FORMAT_OF[number]


def _fill_parameters(message: pb.EffectiveParameters, parameters: EffectiveParameters) -> None:
    for name in _PLAIN_PARAMETERS:
        setattr(message, name, getattr(parameters, name))
    for name in _OPTIONAL_PARAMETERS:
        if (value := getattr(parameters, name)) is not None:
            setattr(message, name, value)
    for one in OWN_STEPS:
        getattr(message, one.name).extend(getattr(parameters, one.name) or ())
    message.scheduler_options.update(parameters.scheduler_options)
    message.loras.update(parameters.loras)


_OPTIONAL_PARAMETERS = ("strength", "clip_skip")
_OTHER_PARAMETERS = {"scheduler_options", "loras", *_OPTIONAL_PARAMETERS, *(one.name for one in OWN_STEPS)}
_NOT_SENT = {"lora_choice", "embeds_guidance", *EMBEDS}
_PLAIN_PARAMETERS = tuple(one.name for one in fields(EffectiveParameters) if one.name not in _OTHER_PARAMETERS | _NOT_SENT)


def _decode_done(parameters: pb.EffectiveParameters, timings: pb.Timings) -> Done:
    values = {name: getattr(parameters, name) for name in _PLAIN_PARAMETERS}
    values |= {name: _optional(parameters, name) for name in _OPTIONAL_PARAMETERS} | own_steps_of(parameters)
    return Done(
        parameters=EffectiveParameters(
            **values, scheduler_options=dict(parameters.scheduler_options), loras=_sorted(parameters.loras)
        ),
        queued_s=timings.queued_s,
        total_s=timings.total_s,
    )


def _sorted(loras: Mapping[str, float]) -> dict[str, float]:
    """The map's order on the wire means nothing."""
    return {name: loras[name] for name in sorted(loras)}


# ---- the server's description ------------------------------------------------------------------------------------


_PLAIN_INFO = tuple(
    one.name
    for one in fields(ServerInfo)
    if one.name
    not in ("defaults", "limits", "parts", "schedulers", "activity", "replicas", "default_scheduler_options", "loras")
)


def encode_server_info(info: ServerInfo) -> pb.GetServerInfoResponse:
    message = pb.GetServerInfoResponse
    replicas = [
        message.Replica(
            index=replica.index,
            is_ready=replica.is_ready,
            num_restarts=replica.num_restarts,
            activity=None if replica.activity is None else _encode_activity(replica.activity),
            devices=replica.devices,
        )
        for replica in info.replicas
    ]
    return message(
        **{name: getattr(info, name) for name in _PLAIN_INFO},
        defaults=message.Defaults(**{one.name: getattr(info.defaults, one.name) for one in fields(GenerationDefaults)}),
        limits=message.Limits(**{one.name: getattr(info.limits, one.name) for one in fields(Limits)}),
        parts=message.Parts(**{one.name: getattr(info.parts, one.name) for one in fields(ModelParts)}),
        schedulers=info.schedulers,
        loras=[encode_lora(lora) for lora in info.loras],
        default_scheduler_options=info.default_scheduler_options,
        activity=_encode_activity(info.activity),
        replicas=replicas,
    )


def decode_server_info(message: pb.GetServerInfoResponse) -> ServerInfo:
    replicas = (
        ReplicaInfo(
            index=replica.index,
            is_ready=replica.is_ready,
            num_restarts=replica.num_restarts,
            activity=_decode_activity(replica.activity) if replica.HasField("activity") else None,
            devices=tuple(replica.devices),
        )
        for replica in message.replicas
    )
    return ServerInfo(
        **{name: getattr(message, name) for name in _PLAIN_INFO},
        defaults=_all_fields(message.defaults, GenerationDefaults),
        limits=_all_fields(message.limits, Limits),
        parts=_all_fields(message.parts, ModelParts) if message.HasField("parts") else ModelParts(),
        schedulers=dict(message.schedulers),
        loras=tuple(decode_lora(lora) for lora in message.loras),
        default_scheduler_options=dict(message.default_scheduler_options),
        activity=_decode_activity(message.activity),
        replicas=tuple(replicas),
    )


def encode_lora(lora: LoraInfo) -> pb.GetServerInfoResponse.Lora:
    return pb.GetServerInfoResponse.Lora(**{one.name: getattr(lora, one.name) for one in fields(LoraInfo)})


def decode_lora(message: pb.GetServerInfoResponse.Lora) -> LoraInfo:
    return _all_fields(message, LoraInfo)


def _encode_activity(activity: Activity) -> pb.GetServerInfoResponse.Activity:
    return pb.GetServerInfoResponse.Activity(**{one.name: getattr(activity, one.name) for one in fields(Activity)})


def _decode_activity(message: pb.GetServerInfoResponse.Activity) -> Activity:
    counts = {one.name: getattr(message, one.name) for one in fields(Activity)}
    return Activity(**{**counts, "max_cells_per_call": _optional(message, "max_cells_per_call")})

"""What the page sends and gets: JSON with diffusers' names. A seed travels as text, for JavaScript's numbers end at 2**53."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping

from mii_serve.errors import InvalidRequestError
from mii_serve.gateway.bodies import no_others
from mii_serve.gateway.parameters import settled, whole
from mii_serve.proto.codec import encode_request
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.types import DEFAULT_SCHEDULER, RANDOM_SEED, ImageFormat, OutputOptions, RequestedParams

_FIELDS = frozenset(RequestedParams.__dataclass_fields__)
_ENGINE = ("engine", "dtype", "device", "model", "model_revision")
_LONGEST_SEED = 30


def read_request(body: object) -> pb.GenerateRequest:
    """The JSON value as a request for PNG files that hold their own parameters.

    Raises:
        InvalidRequestError: naming the field and the rule.
    """
    if not isinstance(body, dict):
        raise InvalidRequestError("body", "must be a JSON object", type(body).__name__)
    asked = dict(body)
    preview_every = whole(asked.pop("preview_every", None))
    no_others("", asked, _FIELDS | {"preview_every"})
    if "seed" in asked:
        asked["seed"] = _seed(asked["seed"])
    asked = settled(asked)
    params = RequestedParams(**{"prompt": "", **asked})
    if preview_every is not None and type(preview_every) is not int:
        raise InvalidRequestError("preview_every", "must be a whole number", type(preview_every).__name__)
    output = OutputOptions.checked(format=ImageFormat.PNG, quality=None, embed_metadata=True, preview_every=preview_every)
    return encode_request(params, output)


def _seed(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value.strip() == str(RANDOM_SEED):
        return RANDOM_SEED
    if not re.fullmatch(rf"[0-9]{{1,{_LONGEST_SEED}}}", value.strip(), re.ASCII):
        raise InvalidRequestError("seed", "must be a whole number in [0, 2**64 - 1]", repr(value[:40]))
    return int(value)


def event_told(event: pb.GenerateEvent) -> tuple[str, dict[str, object]]:
    """The event's name and what the page is told of it."""
    kind = event.WhichOneof("event") or "unknown"
    match kind:
        case "queued":
            queued = event.queued
            wait_s = queued.estimated_wait_s if queued.HasField("estimated_wait_s") else None
            return kind, {
                "request_id": event.request_id,
                "num_samples_ahead": queued.num_samples_ahead,
                "estimated_wait_s": wait_s,
            }
        case "started":
            return kind, {"image_index": event.started.image_index}
        case "step":
            step = event.step
            left_s = step.estimated_left_s if step.HasField("estimated_left_s") else None
            told = {"image_index": step.image_index, "step": step.step, "num_steps": step.num_steps}
            return kind, {**told, "estimated_left_s": left_s}
        case "preview":
            preview = event.preview
            return kind, {
                "image_index": preview.image_index,
                "step": preview.step,
                "width": preview.width,
                "height": preview.height,
                "nsfw_content_detected": _flag(preview, "nsfw_content_detected"),
                "png": _base64(preview.data),
            }
        case "image":
            return kind, _image_told(event.image)
        case "restarted":
            return kind, {"image_indexes": list(event.restarted.image_indexes)}
        case "done":
            return kind, _done_told(event.done)
        case _:
            return kind, {}


def _image_told(image: pb.GeneratedImage) -> dict[str, object]:
    return {
        "image_index": image.index,
        "width": image.width,
        "height": image.height,
        "seed": str(image.seed),
        "nsfw_content_detected": _flag(image, "nsfw_content_detected"),
        "moderation_blocked": _flag(image, "moderation_blocked"),
        "png": _base64(image.data),
    }


def _flag(told: pb.GeneratedImage | pb.GenerateEvent.Preview, name: str) -> bool | None:
    """None before the first look."""
    return getattr(told, name) if told.HasField(name) else None


def _done_told(done: pb.GenerateEvent.Done) -> dict[str, object]:
    names = (*sorted(_FIELDS), *_ENGINE, "dropped_prompt", "dropped_negative_prompt")
    parameters = {name: getattr(done.parameters, name) for name in names} | {"seed": str(done.parameters.seed)}
    parameters |= {
        "scheduler_class": done.parameters.scheduler_class,
        "scheduler_options": dict(done.parameters.scheduler_options),
    }
    return {"parameters": parameters, "queued_s": done.timings.queued_s, "total_s": done.timings.total_s}


def info_told(info: pb.GetServerInfoResponse, grpc_port: int | None) -> dict[str, object]:
    """What the form and the code to copy are made from."""
    names = ("version", "deployment_name", *_ENGINE, "has_safety_checker")
    return {
        **{name: getattr(info, name) for name in names},
        "defaults": _fields(info.defaults),
        "limits": _fields(info.limits),
        "schedulers": _schedulers(info),
        "grpc_port": grpc_port,
    }


def _schedulers(info: pb.GetServerInfoResponse) -> list[str]:
    """The model's own first; class names, which mean much the same once more, are for programs."""
    names = {name for name in info.schedulers.values() if not name[:1].isupper()}
    return sorted(names, key=lambda name: (name != DEFAULT_SCHEDULER, name))


def state_told(info: pb.GetServerInfoResponse) -> dict[str, object]:
    """How busy the server is, for the strip."""
    names = ("uptime_s", "max_slots", "num_running", "num_waiting", "num_steps", "num_images")
    return {
        **{name: getattr(info.activity, name) for name in names},
        "num_replicas": len(info.replicas),
        "num_replicas_ready": sum(replica.is_ready for replica in info.replicas),
    }


def _fields(message: pb.GetServerInfoResponse.Defaults | pb.GetServerInfoResponse.Limits) -> Mapping[str, object]:
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}


def _base64(picture: bytes) -> str:
    return base64.b64encode(picture).decode("ascii")

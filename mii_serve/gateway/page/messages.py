"""What the page sends and gets: JSON with the values' own names. A seed is text there: JavaScript's numbers end at 2**53."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BeforeValidator

from mii_serve.gateway.generation import to_base64
from mii_serve.gateway.json_body import WholeNumber, broken_rule, validated
from mii_serve.gateway.openapi import JSON_TYPES
from mii_serve.gateway.parameters import Parameters, names_without, requested, with_parameters
from mii_serve.types import (
    DEFAULT_SCHEDULER,
    PARAMETER_NAMES,
    PARAMETERS,
    RANDOM_SEED,
    STRENGTH,
    Done,
    Event,
    GenerationRequest,
    ImageFormat,
    ImageReady,
    OutputOptions,
    Parameter,
    Preview,
    Queued,
    Restarted,
    ServerInfo,
    Started,
    Step,
)

_ENGINE = ("engine", "dtype", "device", "model", "model_revision")
_MAX_SEED_DIGITS = 30
_EVENT_NAMES: dict[type, str] = {
    Queued: "queued",
    Started: "started",
    Step: "step",
    Preview: "preview",
    ImageReady: "image",
    Restarted: "restarted",
    Done: "done",
}
_DONE = (
    *PARAMETER_NAMES,
    *_ENGINE,
    *("loras", "dropped_prompt", "dropped_negative_prompt", "scheduler_class", "scheduler_options", "strength", "has_mask"),
)
"""Members of the parameters that were really used."""


def _seed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.strip() == str(RANDOM_SEED):
        return RANDOM_SEED
    if not re.fullmatch(rf"[0-9]{{1,{_MAX_SEED_DIGITS}}}", value.strip(), re.ASCII):
        raise broken_rule("must be a whole number in [0, 2**64 - 1]")
    return int(value)


class _PageBody(Parameters):
    seed: Annotated[WholeNumber | None, BeforeValidator(_seed)] = None
    preview_every: WholeNumber | None = None
    strength: float | None = None


PageBody = with_parameters(_PageBody, names_without("seed"))


def parse(body: object, files: Mapping[str, bytes] = MappingProxyType({})) -> GenerationRequest:
    """The JSON value as a request for PNG files that hold their own parameters; `files` are its images by their names.

    Raises:
        InvalidRequestError: naming the field and the rule.
    """
    page = validated(PageBody, body)
    output = OutputOptions.checked(format=ImageFormat.PNG, quality=None, embed_metadata=True, preview_every=page.preview_every)
    image, mask_image = files.get("image"), files.get("mask_image")
    params = replace(requested(page.given()), strength=page.strength, image=image, mask_image=mask_image)
    return GenerationRequest(params=params, output=output)


def event_to_json(event: Event, request_id: str) -> tuple[str, dict[str, Any]]:
    """The event's name and its members."""
    members: dict[str, Any] = {one.name: getattr(event, one.name) for one in fields(event)}
    match event:
        case Queued():
            members = {"request_id": request_id, **members}
        case Preview() | ImageReady():
            del members["format"]
            members["png"] = to_base64(members.pop("encoded"))
        case Done():
            members["parameters"] = _with_text_seed({name: getattr(event.parameters, name) for name in _DONE})
            members["parameters"]["scheduler_options"] = dict(event.parameters.scheduler_options)
    return _EVENT_NAMES[type(event)], _with_text_seed(members)


def _with_text_seed(members: dict[str, Any]) -> dict[str, Any]:
    return {**members, "seed": str(members["seed"])} if "seed" in members else members


def info_to_json(info: ServerInfo, grpc_port: int | None) -> dict[str, Any]:
    """What the form and the code to copy are made from."""
    names = ("version", "deployment_name", *_ENGINE, "has_safety_checker", "needs_mask")
    return {
        **{name: getattr(info, name) for name in names},
        "defaults": asdict(info.defaults),
        "limits": asdict(info.limits),
        "schedulers": _schedulers(info.schedulers),
        "parameters": [_parameter_to_json(parameter, info) for parameter in PARAMETERS],
        "strength": _parameter_to_json(STRENGTH, info),
        "grpc_port": grpc_port,
    }


def _parameter_to_json(parameter: Parameter, info: ServerInfo) -> dict[str, Any]:
    least, most = (None, None) if parameter.bounds is None else parameter.bounds(info.limits)
    return {
        "name": parameter.name,
        "type": JSON_TYPES[parameter.kind],
        "help": parameter.help,
        "default": parameter.default_in(info.defaults),
        "least": least,
        "most": most,
        "multiple_of": parameter.multiple_of,
    }


def _schedulers(schedulers: Mapping[str, str]) -> list[str]:
    """The model's own first; class names, which mean much the same once more, are for programs."""
    names = {name for name in schedulers.values() if not name[:1].isupper()}
    return sorted(names, key=lambda name: (name != DEFAULT_SCHEDULER, name))


def state_to_json(info: ServerInfo) -> dict[str, Any]:
    """How busy the server is, for the strip at the top."""
    names = ("uptime_s", "max_slots", "num_running", "num_waiting", "num_steps", "num_images")
    return {
        **{name: getattr(info.activity, name) for name in names},
        "num_replicas": len(info.replicas),
        "num_replicas_ready": sum(replica.is_ready for replica in info.replicas),
    }

"""A request's own steps and embeddings ⇄ the fields of its message."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from mii_serve.errors import InvalidRequestError
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.types import EMBEDS, OWN_STEPS, GenerationParams, Parameter, PromptEmbeds, RequestedParams


def put_conditioning(message: pb.GenerateRequest, params: RequestedParams | GenerationParams) -> None:
    """Write what is given; the rest stays absent.

    Raises:
        InvalidRequestError: a value that has no place in its field.
    """
    for one in OWN_STEPS:
        if (values := getattr(params, one.name)) is not None:
            _put_list(message, one, values)
    for name in EMBEDS:
        if (embeds := getattr(params, name)) is not None:
            _put_embeds(getattr(message, name), name, embeds)


def conditioning_of(message: pb.GenerateRequest) -> dict[str, Any]:
    """The parameters by name; embeddings that are absent are left out."""
    embeds = {
        name: PromptEmbeds(**{one.name: getattr(getattr(message, name), one.name) for one in fields(PromptEmbeds)})
        for name in EMBEDS
        if message.HasField(name)
    }
    return own_steps_of(message) | embeds


def own_steps_of(message: pb.GenerateRequest | pb.EffectiveParameters) -> dict[str, Any]:
    """A list that is empty is absent."""
    return {one.name: tuple(getattr(message, one.name)) or None for one in OWN_STEPS}


def _put_list(message: pb.GenerateRequest, parameter: Parameter, values: Any) -> None:
    try:
        if not values or not isinstance(values, list | tuple) or any(isinstance(value, bool) for value in values):
            raise TypeError
        getattr(message, parameter.name).extend(values)
    except (TypeError, ValueError):
        kind = "32-bit whole numbers" if parameter.kind is int else "numbers"
        rule = f"must be a list of {kind}, one or more"
        raise InvalidRequestError(parameter.name, rule, type(values).__name__) from None


def _put_embeds(message: pb.PromptEmbeds, name: str, embeds: Any) -> None:
    try:
        for one in fields(PromptEmbeds):
            setattr(message, one.name, getattr(embeds, one.name))
    except (AttributeError, TypeError, ValueError):
        raise InvalidRequestError(name, "must be PromptEmbeds that fit the message's fields", type(embeds).__name__) from None

"""The parameters of a request as members of JSON bodies; their names and types come from their declarations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import create_model

from mii_serve.gateway.json_body import JsonObject, WholeNumber
from mii_serve.types import EMBEDS, OWN_STEPS, PARAMETER_NAMES, PARAMETERS, RANDOM_SEED, RequestedParams

_TYPES: dict[type, Any] = {str: str, int: WholeNumber, float: float}
_LIST_TYPES: dict[type, Any] = {int: list[WholeNumber], float: list[float]}
_LISTS = tuple(one.name for one in OWN_STEPS)


class Parameters(JsonObject):
    """A JSON object that has parameters among its members; null is the same as left out."""

    unsupported: ClassVar = dict.fromkeys(EMBEDS, "is not taken in JSON: gRPC and the Python SDK have it")

    loras: dict[str, float] | None = None

    def given(self) -> dict[str, Any]:
        """The parameters that the caller named, in the order of their declaration."""
        names = (*PARAMETER_NAMES, *_LISTS, "loras")
        values = {name: getattr(self, name) for name in names if name in self.model_fields_set}
        return {name: value for name, value in values.items() if value is not None}


Body = TypeVar("Body", bound=Parameters)


def with_parameters(base: type[Body], names: Collection[str]) -> type[Body]:
    """The model with these parameters as further, optional members."""
    members: dict[str, Any] = {
        parameter.name: (_TYPES[parameter.kind] | None, None) for parameter in PARAMETERS if parameter.name in names
    }
    members |= {one.name: (_LIST_TYPES[one.kind] | None, None) for one in OWN_STEPS if one.name in names}
    return create_model(base.__name__, __base__=base, **members)


def names_without(*names: str) -> tuple[str, ...]:
    """All parameters but these, and the lists at the end."""
    return tuple(name for name in (*PARAMETER_NAMES, *_LISTS) if name not in names)


def requested(given: Mapping[str, Any]) -> RequestedParams:
    """The parameters of a request; a seed of -1 is the same as none."""
    seed = given.get("seed")
    return RequestedParams(**{"prompt": "", **given, "seed": None if seed == RANDOM_SEED else seed})

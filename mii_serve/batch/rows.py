"""One row of an input: its parameters, its id, and whatever else its author wrote into it.

A row is a record of names and values. Names of parameters are those of `mii_serve.types.PARAMETERS`; `id` names the row; other
names are kept for the index. A record with `custom_id` and `body` is a line of OpenAI's batch format.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mii_serve.errors import InvalidRequestError
from mii_serve.types import EMBEDS, OWN_STEPS, PARAMETER_NAMES, PARAMETERS, RequestedParams, checked_loras, parsed_loras

ID = "id"
LORAS = "loras"
MAX_ID_CHARS = 512
NEAR = 0.8
"""The similarity (`difflib` ratio, 0 to 1) from which a name counts as a misspelt parameter."""
OPENAI_URL = "/v1/images/generations"
OPENAI_NAMES = {"n": "num_images_per_prompt"}
WITHOUT_EFFECT = frozenset(
    {"model", "user", "quality", "style", "moderation", "background", "response_format", "output_format", "safety_identifier"}
)
"""Members of OpenAI's body that do not change the picture here."""
OF_IMAGES = ("image", "mask_image", "strength")
"""Parameters of requests that start from an image, which jobs do not have."""
OF_LISTS = (*(one.name for one in OWN_STEPS), *EMBEDS)
_SIZE = re.compile(r"(\d{1,9})[xX](\d{1,9})", re.ASCII)
_KINDS = {parameter.name: parameter for parameter in PARAMETERS}


class RowError(Exception):
    """A row cannot be used. `name` is the member that is wrong, empty for the whole row."""

    def __init__(self, name: str, rule: str) -> None:
        super().__init__(f"{name}: {rule}" if name else rule)
        self.name = name


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a row asks for. `extra` are the members that are no parameters."""

    id: str | None
    params: RequestedParams
    extra: Mapping[str, Any] = field(default_factory=dict)


def row_of(record: Mapping[str, Any]) -> Row:
    """The row that a record of typed values describes; null is the same as left out.

    Raises:
        RowError: a name or the kind of a value is wrong.
    """
    if "custom_id" in record and "body" in record:
        return _openai_row(record)
    return _row(record.get(ID), record)


def row_of_text(record: Mapping[str, str]) -> Row:
    """The row that a record of text describes; an empty text is the same as left out, but for the prompt.

    Raises:
        RowError: as `row_of`, or a text is no number.
    """
    members: dict[str, Any] = {}
    for name, text in record.items():
        parameter = _KINDS.get(name)
        if text == "" and name != "prompt":
            continue
        if name == LORAS:
            members[name] = _loras_of_text(text)
            continue
        members[name] = text if parameter is None or parameter.kind is str else _number(name, text, parameter.kind)
    return _row(members.pop(ID, None), members)


def _number(name: str, text: str, kind: type) -> float:
    try:
        return int(text) if kind is int else float(text)
    except ValueError:
        raise RowError(name, f"must be {'a whole number' if kind is int else 'a number'}, got {text[:40]!r}") from None


def _row(row_id: Any, members: Mapping[str, Any]) -> Row:
    given: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name, value in members.items():
        if name == ID:
            continue
        if name == LORAS:
            if value is not None:
                given[name] = _loras_of(value)
        elif name not in _KINDS:
            if name in OF_IMAGES:
                raise RowError(name, "a row cannot start from an image; rename the member if it is something else")
            if name in OF_LISTS:
                raise RowError(name, "is not for rows; rename the member if it is something else")
            if (meant := near_parameter(name)) is not None:
                raise RowError(name, f"no such parameter; did you mean {meant}? Rename it if it is something else")
            extra[name] = value
        elif value is not None:
            try:
                given[name] = _KINDS[name].of_kind(value)
            except InvalidRequestError as error:
                raise RowError(name, str(error).removeprefix(f"{name}: ")) from None
    if "prompt" not in given:
        raise RowError("prompt", "is missing")
    return Row(id=None if row_id is None else _checked_id(row_id), params=RequestedParams(**given), extra=extra)


def _loras_of_text(text: str) -> dict[str, float]:
    try:
        return parsed_loras(text)
    except InvalidRequestError as error:
        raise RowError(LORAS, str(error).removeprefix(f"{LORAS}: ")) from None


def _loras_of(value: Any) -> dict[str, float]:
    try:
        return checked_loras(value)
    except InvalidRequestError as error:
        raise RowError(LORAS, str(error).removeprefix(f"{LORAS}: ")) from None


def _checked_id(row_id: Any) -> str:
    if isinstance(row_id, bool) or not isinstance(row_id, str | int):
        raise RowError(ID, f"must be text or a whole number, got {type(row_id).__name__}")
    text = str(row_id)
    if not 1 <= len(text) <= MAX_ID_CHARS:
        raise RowError(ID, f"must have 1 to {MAX_ID_CHARS} characters, got {len(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError(ID, "must be valid Unicode text without lone surrogates") from None
    return text


@functools.lru_cache(maxsize=4096)
def near_parameter(name: str) -> str | None:
    """The parameter of which this unknown name is a misspelling; None where it is a name of its own."""
    return next(iter(difflib.get_close_matches(name, PARAMETER_NAMES, 1, NEAR)), None)


def _openai_row(record: Mapping[str, Any]) -> Row:
    for name in record:
        if name not in ("custom_id", "method", "url", "body"):
            raise RowError(name, "no such member; a line has custom_id, method, url and body")
    if record.get("method", "POST") != "POST":
        raise RowError("method", "must be POST")
    if record.get("url", OPENAI_URL) != OPENAI_URL:
        raise RowError("url", f"must be {OPENAI_URL}")
    body = record["body"]
    if not isinstance(body, dict):
        raise RowError("body", f"must be an object, got {type(body).__name__}")
    members: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name, value in body.items():
        if name == "size":
            members |= _size(value)
        elif name in WITHOUT_EFFECT:
            extra[name] = value
        elif (own_name := OPENAI_NAMES.get(name, name)) in _KINDS or own_name == LORAS:
            members[own_name] = value
        else:
            raise RowError(name, "is not supported in a batch")
    row = _row(record["custom_id"], members)
    return Row(id=row.id, params=row.params, extra=extra)


def _size(value: Any) -> dict[str, int]:
    if value in (None, "auto"):
        return {}
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise RowError("size", "must be auto or WIDTHxHEIGHT, such as 512x512")
    return {"width": int(match[1]), "height": int(match[2])}

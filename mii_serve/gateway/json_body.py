"""The body of an HTTP request: read within bounds of size and time, and checked against a pydantic model.

What JSON leaves open is refused here: a key that is written twice, NaN and Infinity, nesting without end. A refusal names one
member by its JSON path, and the rule.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from starlette.requests import Request

from mii_serve.errors import InvalidRequestError, RequestCancelledError
from mii_serve.gateway.errors import BodyTooLargeError, MediaTypeError
from mii_serve.server.suggestions import unknown_member_rule
from mii_serve.types import MAX_SEED

BODY = "body"
"""What an error calls a body as a whole."""
BODY_TIMEOUT_S = 30.0
"""A body that trickles in must not hold a connection for ever."""
FILE_TIMEOUT_S = 120.0
"""Of one that may have files in it."""
MAX_DISCARDED_BYTES = 64 * 1024 * 1024
"""Of a body that is too large so much is read on and dropped: a caller whose connection is closed while it sends does not see
the answer."""
MAX_FILE_SIGNS = 1000
"""Commas and brackets of a body that is large because it has files in it; base64 has none."""
SHOWN_CHARS = 60
UTF8 = frozenset({"utf8", "ascii", "usascii"})
"""Charsets that are UTF-8 or a part of it, without the signs in their names."""


# ---- reading -----------------------------------------------------------------------------------------------------


async def read_json(request: Request, max_bytes: int, max_file_bytes: int = 0) -> Any:
    """The body as a JSON value. One of up to `max_file_bytes` may be larger, if few members take all of it, as files do.

    Raises:
        BodyTooLargeError, MediaTypeError, InvalidRequestError: naming the rule.
        RequestCancelledError: the caller left before the body was complete.
    """
    _check_media_type(request.headers.get("content-type", ""))
    raw = await read_raw(request, max(max_bytes, max_file_bytes), FILE_TIMEOUT_S if max_file_bytes else None)
    if len(raw) > max_bytes and sum(map(raw.count, (b",", b"[", b"{"))) > MAX_FILE_SIGNS:  # slow to read
        raise too_large(max_bytes)
    return json_value(raw)


def json_value(raw: bytes) -> Any:
    """A body that has been read, as a JSON value.

    Raises:
        InvalidRequestError: naming the rule.
    """
    if not raw.strip():
        raise InvalidRequestError(BODY, "must be a JSON object", "nothing")
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise InvalidRequestError(BODY, "must be UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise InvalidRequestError(BODY, f"must be JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise InvalidRequestError(BODY, "is nested too deeply") from None
    except ValueError:  # an integer of more digits than Python reads
        raise InvalidRequestError(BODY, "has a number that is too long") from None


def _check_media_type(value: str) -> None:
    media_type, _, parameters = value.partition(";")
    media_type = media_type.strip().lower()
    if media_type != "application/json" and not (media_type.startswith("application/") and media_type.endswith("+json")):
        raise MediaTypeError("content-type", "must be application/json", repr(value[:SHOWN_CHARS]) if value else "nothing")
    charsets = re.findall(r"(?:^|;)\s*charset\s*=([^;]*)", parameters.lower())
    if any(re.sub(r"[^a-z0-9]", "", charset) not in UTF8 for charset in charsets):
        raise MediaTypeError("content-type", "must have the charset utf-8", repr(value[:SHOWN_CHARS]))


async def read_raw(request: Request, max_bytes: int, timeout_s: float | None = None) -> bytes:
    """The bytes of a body, which has `BODY_TIMEOUT_S` to arrive, or this.

    Raises:
        BodyTooLargeError, MediaTypeError, InvalidRequestError: naming the rule.
        RequestCancelledError: the caller left before the body was complete.
    """
    if (coding := request.headers.get("content-encoding", "identity")).lower() != "identity":
        raise MediaTypeError("content-encoding", "must be left out: bodies are not unpacked here", shown(coding))
    body, num_bytes, timeout_s = bytearray(), 0, timeout_s or BODY_TIMEOUT_S
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise RequestCancelledError("the caller has gone away")
                piece = message.get("body", b"")
                num_bytes += len(piece)
                if num_bytes <= max_bytes:
                    body += piece
                if num_bytes > MAX_DISCARDED_BYTES or not message.get("more_body", False):
                    break
    except TimeoutError:
        raise InvalidRequestError(BODY, f"must arrive within {timeout_s:g} seconds") from None
    if num_bytes > max_bytes:
        raise too_large(max_bytes)
    return bytes(body)


def too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(BODY, f"must be at most {max_bytes} bytes")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise InvalidRequestError(BODY, "must not have a key twice in one object", shown(_first_twice(pairs)))
    return members


def _first_twice(pairs: list[tuple[str, Any]]) -> str | None:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            return name
        seen.add(name)
    return None


def _refuse_constant(text: str) -> NoReturn:
    raise InvalidRequestError(BODY, "must be JSON, which has no NaN or Infinity", text)


# ---- checking ----------------------------------------------------------------------------------------------------


class JsonObject(BaseModel):
    """A JSON object with known members of known types; nothing is converted but 4.0, which is the whole number 4."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    unsupported: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Members of the protocol that are refused, with the rule that says why."""

    @classmethod
    def prepared(cls, members: dict[str, Any]) -> dict[str, Any]:
        """The members to check the types of; for subclasses in which some values mean that a member is left out."""
        return members

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, value: Any) -> Any:
        """Refuse the first unknown member, however many there are."""
        if not isinstance(value, dict):
            raise broken_rule("must be a JSON object")
        for name in value:
            if name not in cls.model_fields:
                rule = cls.unsupported.get(name) or unknown_member_rule(name, cls.model_fields)
                raise PydanticCustomError(_UNKNOWN, "{rule}", {"rule": rule, "member": shown(name)[1:-1]})
        return cls.prepared(value)


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 4.0 is the whole number 4. Anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WholeNumber = Annotated[int, BeforeValidator(_whole), Field(ge=-(2**63), le=MAX_SEED)]
"""At most 64 bits: longer ones cannot be added up or shown cheaply."""

Model = TypeVar("Model", bound=JsonObject)


def validated(model: type[Model], value: Any) -> Model:
    """The JSON value as this model.

    Raises:
        InvalidRequestError: naming the first member that breaks a rule by its path, and the rule.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    raise _refusal(first)


def broken_rule(rule: str) -> PydanticCustomError:
    """What a validator raises: the rule that its member breaks."""
    return PydanticCustomError(_RULE, "{rule}", {"rule": rule})


def one_of(choices: Collection[str]) -> AfterValidator:
    """The rule that a text is one of these."""

    def check(value: str) -> str:
        if value not in choices:
            raise broken_rule(f"must be one of {', '.join(choices)}")
        return value

    return AfterValidator(check)


_RULE, _UNKNOWN = "rule", "unknown_member"
_RULES = {
    "missing": "is missing",
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be an array",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
}


def _refusal(error: ErrorDetails) -> InvalidRequestError:
    kind, context = error["type"], error.get("ctx", {})
    path = path_of(*error["loc"])
    if kind == _UNKNOWN:
        return InvalidRequestError(path_of(*error["loc"], context["member"]), context["rule"])
    rule = context["rule"] if kind == _RULE else _RULES.get(kind, error["msg"]).format(**context)
    return InvalidRequestError(path or BODY, rule, None if kind == "missing" else shown(error["input"]))


def path_of(*parts: str | int) -> str:
    """How errors name a member: `input_data.data[0].prompt`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def shown(value: object) -> str:
    """A value fit for an error's text: short, and without the inside of what is large."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        value = value[:SHOWN_CHARS]
    if isinstance(value, int | float | str):
        return repr(value)[:SHOWN_CHARS].encode("ascii", "backslashreplace").decode()
    return "an array" if isinstance(value, list) else "an object"

"""The body of an HTTP request: bounded in size and time, and JSON without surprises.

What JSON leaves open is refused here: a key that is written twice, NaN and Infinity, nesting without end.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Collection, Iterable
from typing import Any, NoReturn

from starlette.requests import Request

from mii_serve.errors import InvalidRequestError, RequestCancelledError
from mii_serve.gateway.parameters import unknown_member
from mii_serve.gateway.problems import BodyTooLargeError, MediaTypeError

BODY = "body"
BODY_TIMEOUT_S = 30.0
"""A body that trickles in must not hold a connection for ever."""
MAX_DISCARDED_BYTES = 64 * 1024 * 1024
"""Of a body that is too large so much is read on and dropped: who is hung up on while sending does not hear the answer."""
SHOWN_CHARS = 60
UTF8 = frozenset({"utf8", "ascii", "usascii"})
"""Charsets that are UTF-8 or a part of it, without the signs in their names."""


async def read_json(request: Request, max_bytes: int) -> Any:
    """The body as a JSON value.

    Raises:
        BodyTooLargeError, MediaTypeError, InvalidRequestError: naming the rule.
        RequestCancelledError: the caller left in the middle of it.
    """
    _check_media_type(request.headers.get("content-type", ""))
    if (coding := request.headers.get("content-encoding", "identity")).lower() != "identity":
        raise MediaTypeError("content-encoding", "must be left out: bodies are not unpacked here", shown(coding))
    raw = await _read(request, max_bytes)
    if not raw.strip():
        raise InvalidRequestError(BODY, "must be a JSON object", "nothing")
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_no_constant)
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


async def _read(request: Request, max_bytes: int) -> bytes:
    body, num_bytes = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
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
        raise InvalidRequestError(BODY, f"must arrive within {BODY_TIMEOUT_S:g} seconds") from None
    if num_bytes > max_bytes:
        raise BodyTooLargeError(BODY, f"must be at most {max_bytes} bytes")
    return bytes(body)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequestError(BODY, "must not have a key twice in one object", shown(twice))
    return found


def _no_constant(text: str) -> NoReturn:
    raise InvalidRequestError(BODY, "must be JSON, which has no NaN or Infinity", text)


# ---- the parts of a body -----------------------------------------------------------------------------------------


def shown(value: object) -> str:
    """A value fit for an error's text: short, and without the inside of what is large."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | str):
        return repr(value)[:SHOWN_CHARS].encode("ascii", "backslashreplace").decode()
    return "an array" if isinstance(value, list) else "an object"


def inside(path: str, name: str) -> str:
    """The path of a member; the whole body has none."""
    return f"{path}.{name}" if path else name


def an_object(path: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequestError(path or BODY, "must be a JSON object", shown(value))
    return value


def a_text(path: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(path, "must be text", shown(value))
    return value


def one_of(path: str, value: object, choices: Collection[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise InvalidRequestError(path, f"must be one of {', '.join(choices)}", shown(value))
    return value


def no_others(path: str, value: dict[str, Any], known: Iterable[str]) -> None:
    """Refuse, by name, a member that nobody reads."""
    names = set(known)
    for name in value:
        if name not in names:
            raise unknown_member(inside(path, shown(name)[1:-1]), name, names)

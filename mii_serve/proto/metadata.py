"""Names of headers and metadata, and the rules for the ids in them. No gRPC, no protobuf: HTTP uses the same."""

from __future__ import annotations

import re

from mii_serve.errors import InvalidRequestError

REQUEST_ID_KEY = "x-request-id"
"""A caller's name for a call: echoed and logged, never used to tell calls apart, so that many calls may have the same one."""
CLIENT_ID_KEY = "x-client-id"
"""On whose behalf a call is made: how one address shares its part of a busy server among those it calls for."""
IDEMPOTENCY_KEY = "x-idempotency-key"
"""A caller's own name for a piece of work: the same name is worked on once and answered alike."""
TIMEOUT_KEY = "x-request-timeout-s"
"""Seconds the caller waits at most. Over gRPC it repeats the call's own deadline, for proxies that end the call and do not pass
the deadline on."""
AUTHORIZATION_KEY = "authorization"
PROVENANCE_KEY = "x-mii-provenance"
"""Which marks the images of an answer carry: of `xmp`, `c2pa` and `watermark`, or `none`."""
STATUS_DETAILS_KEY = "grpc-status-details-bin"
"""Where gRPC puts a `google.rpc.Status`."""

MAX_ID_CHARS = 100
_ID = re.compile(rf"[!-~]{{1,{MAX_ID_CHARS}}}")
_SECONDS = re.compile(r"\d{1,9}(\.\d{1,9})?")
_CLIENT_ID = re.compile(rf"[ -~]{{1,{MAX_ID_CHARS}}}")


def check_request_id(given: str) -> str:
    """The id, if it is one.

    Raises:
        InvalidRequestError: it breaks the rule.
    """
    return _checked(REQUEST_ID_KEY, given, _ID)


def check_idempotency_key(given: str) -> str:
    """The key, if it is one.

    Raises:
        InvalidRequestError: it breaks the rule.
    """
    return _checked(IDEMPOTENCY_KEY, given, _ID)


def check_client_id(given: str | None) -> str | None:
    """The id, if it is one or there is none.

    Raises:
        InvalidRequestError: it breaks the rule.
    """
    return None if given is None else _checked(CLIENT_ID_KEY, given, _CLIENT_ID, may_have_spaces=True)


def check_timeout_s(given: str) -> float:
    """The seconds.

    Raises:
        InvalidRequestError: they are none.
    """
    if not _SECONDS.fullmatch(given) or not float(given) > 0:
        raise InvalidRequestError(TIMEOUT_KEY, "must be a number of seconds above 0", repr(given[:20]))
    return float(given)


def _checked(name: str, given: object, pattern: re.Pattern[str], *, may_have_spaces: bool = False) -> str:
    if not isinstance(given, str) or not pattern.fullmatch(given):
        rule = f"must be 1 to {MAX_ID_CHARS} printable ASCII characters" + ("" if may_have_spaces else " without spaces")
        raise InvalidRequestError(name, rule)
    return given

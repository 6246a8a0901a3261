"""Errors on the wire: a `google.rpc.Status` whose details name the field and the rule.

The rich error model is https://google.aip.dev/193: BadRequest carries the violated rule, ErrorInfo the error's class name,
RetryInfo when to try again.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from mii_serve.errors import (
    ContentBlockedError,
    InvalidRequestError,
    MiiServeError,
    ModerationStage,
    QueueFullError,
    error_for_grpc_code,
)
from mii_serve.proto.metadata import STATUS_DETAILS_KEY

ERROR_DOMAIN = "mii_serve"

Metadata = Iterable[tuple[str, str | bytes]]


def encode_error(error: MiiServeError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """What to end a call with: the code, the text and the trailing metadata."""
    return grpc.StatusCode[error.grpc_code], str(error), ((STATUS_DETAILS_KEY, status_of(error).SerializeToString()),)


def status_of(error: MiiServeError) -> status_pb2.Status:
    """The error with all that `error_of` needs to build it again."""
    facts = _block_facts(error) if isinstance(error, ContentBlockedError) else {}
    cause = error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=ERROR_DOMAIN, metadata=facts)
    details: list[any_pb2.Any] = [_packed(cause)]
    if isinstance(error, InvalidRequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
        details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    if isinstance(error, QueueFullError) and error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(_packed(retry))
    number = code_pb2.Code.Value(error.grpc_code)
    return status_pb2.Status(code=number, message=str(error), details=details)


def decode_error(code: grpc.StatusCode, text: str, trailing: Metadata | None) -> MiiServeError:
    """The error a client raises for a failed call; typed as it was when the server raised it."""
    return _error(code.name, text, _details(trailing))


def error_of(status: status_pb2.Status) -> MiiServeError:
    """The error that `status_of` wrote down."""
    return _error(code_pb2.Code.Name(status.code), status.message, status.details)


def _error(code: str, text: str, details: Sequence[any_pb2.Any]) -> MiiServeError:
    info = _unpacked(details, error_details_pb2.ErrorInfo())
    if code == "INVALID_ARGUMENT":
        for violation in _unpacked(details, error_details_pb2.BadRequest()).field_violations:
            if info.reason == ContentBlockedError.__name__:
                return _block(violation.field, info.metadata)
            rule = violation.description.removeprefix(f"{violation.field}: ")
            return InvalidRequestError(violation.field, rule)
        return InvalidRequestError("request", text)
    error = error_for_grpc_code(code, info.reason)(text or code)
    if isinstance(error, QueueFullError):
        retry = _unpacked(details, error_details_pb2.RetryInfo())
        error.retry_after_s = retry.retry_delay.ToMilliseconds() / 1000 if retry.HasField("retry_delay") else None
    return error


def _block_facts(error: ContentBlockedError) -> dict[str, str]:
    facts = {"stage": error.stage, "onBlocklist": str(error.on_blocklist).lower()}
    return facts | {f"severity{name}": str(severity) for name, severity in error.categories.items()}


def _block(field: str, facts: Mapping[str, str]) -> ContentBlockedError:
    categories = {
        key.removeprefix("severity"): int(text)
        for key, text in sorted(facts.items())
        if key.startswith("severity") and re.fullmatch("[0-9]{1,3}", text)
    }
    stage: ModerationStage = "output" if facts.get("stage") == "output" else "input"
    return ContentBlockedError(field, categories, stage=stage, on_blocklist=facts.get("onBlocklist") == "true")


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _details(trailing: Metadata | None) -> Sequence[any_pb2.Any]:
    for key, value in trailing or ():
        if key == STATUS_DETAILS_KEY and isinstance(value, bytes):
            with contextlib.suppress(DecodeError):  # details another party damaged tell nothing
                return list(status_pb2.Status.FromString(value).details)
    return ()


M = TypeVar("M", bound=Message)


def _unpacked(details: Iterable[any_pb2.Any], into: M) -> M:
    """The first detail of this kind; the empty message where there is none."""
    for detail in details:
        with contextlib.suppress(DecodeError):
            if detail.Unpack(into):
                break
    return into

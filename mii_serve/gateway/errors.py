"""Errors as HTTP answers, for every dialect.

The body is one object in which Azure ML's client, the OpenAI client and plain readers find their parts; Hugging Face's form is
in `dialects/huggingface.py`. Which status an error has depends on the dialect, because clients retry by status: where a second
try would fail again, or cost the work again, the status is one that its client does not retry.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from starlette.responses import Response

from mii_serve.errors import (
    ContentBlockedError,
    DeadlineExceededError,
    InvalidRequestError,
    MiiServeError,
    ModerationStage,
    NotFoundError,
    QueueFullError,
    RateLimitedError,
    RequestCancelledError,
    UnauthenticatedError,
    UnavailableError,
)

SHORTEST_RETRY_S = 1
"""`Retry-After` counts in whole seconds."""


class MethodNotAllowedError(MiiServeError):
    grpc_code = "UNIMPLEMENTED"
    http_status = 405


class NotAcceptableError(InvalidRequestError):
    """The caller accepts no format that we have."""

    http_status = 406


class BodyTooLargeError(InvalidRequestError):
    http_status = 413


class MediaTypeError(InvalidRequestError):
    http_status = 415


class OverLimitError(InvalidRequestError):
    """A well-formed request asks for more than this server makes."""

    http_status = 422


class OtherHostError(InvalidRequestError):
    """The request is meant for a server of another name."""

    http_status = 421


class OtherOriginError(InvalidRequestError):
    """A page of another site asks, through its visitor's browser."""

    http_status = 403


class HeaderTooLongError(InvalidRequestError):
    http_status = 431


class ImagesHeldBackError(MiiServeError):
    """No image of the request can be sent: content safety blocked them, or the model's own checker fired on all."""

    grpc_code = "INVALID_ARGUMENT"
    http_status = 400
    stage: ModerationStage = "output"

    def __init__(self, text: str, category: str) -> None:
        super().__init__(text)
        self.categories: Mapping[str, int | None] = {category: None}


Blocked = ContentBlockedError | ImagesHeldBackError

_CODES: dict[int, str] = {
    401: "invalid_api_key",
    403: "permission_denied",
    404: "not_found",
    405: "method_not_allowed",
    406: "not_acceptable",
    409: "conflict",
    413: "request_too_large",
    415: "unsupported_media_type",
    421: "misdirected_request",
    422: "limit_exceeded",
    429: "rate_limit_exceeded",
    431: "header_too_long",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What went wrong. `field` is the member of the request that is to blame, where one is."""

    status: int
    code: str
    message: str
    field: str | None
    retry_after_s: int | None
    is_worth_retrying: bool

    @property
    def kind(self) -> str:
        """OpenAI's type of error."""
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 and self.status != 424 else "server_error"


def problem_of(error: MiiServeError, *, failed: int, late: int) -> Problem:
    """The problem an error is; work that failed has the status `failed`, and work that was late `late`."""
    status, code = error.http_status, _CODES.get(error.http_status, "invalid_value")
    retry_after_s = None
    if isinstance(error, DeadlineExceededError):
        status, code = late, "deadline_exceeded"
    elif isinstance(error, RequestCancelledError):
        status, code = failed, "cancelled"
    elif isinstance(error, UnavailableError):
        code = "unavailable"
    elif isinstance(error, Blocked):
        code = "content_filter"
    elif isinstance(error, NotFoundError):
        code = error.code
    elif isinstance(error, OtherOriginError):
        code = "forbidden_origin"
    elif status >= 500:
        status, code = failed, "generation_failed"
    if isinstance(error, QueueFullError) and error.retry_after_s is not None:
        retry_after_s = max(SHORTEST_RETRY_S, math.ceil(error.retry_after_s))
    return Problem(
        status=status,
        code=code,
        message=str(error),
        field=error.field if isinstance(error, InvalidRequestError) else None,
        retry_after_s=retry_after_s,
        is_worth_retrying=isinstance(error, QueueFullError | UnavailableError) and status in (429, 503),
    )


def azure_problem(error: MiiServeError) -> Problem:
    """For `/score`: 424 is what Azure's own gateway answers for a container that failed, and what its client never repeats."""
    problem = problem_of(error, failed=424, late=424)
    if isinstance(error, QueueFullError) and not isinstance(error, RateLimitedError):
        # With Retry-After that client would try three times more at a server that is full. When a limit ends is certain.
        return replace(problem, retry_after_s=None)
    return problem


def openai_problem(error: MiiServeError) -> Problem:
    """For `/v1`: `x-should-retry` says to its client which requests it may send again after a 5xx."""
    return problem_of(error, failed=500, late=504)


def envelope(problem: Problem) -> dict[str, object]:
    """The body: `error` for Azure ML and OpenAI, `message` for the readers of azmlinfsrv's answers."""
    inner = {
        "code": problem.code,
        "message": problem.message,
        "type": problem.kind,
        "param": problem.field,
        "status": problem.status,
    }
    return {"error": inner, "message": problem.message}


def problem_response(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    return Response(
        json.dumps(envelope(problem)), problem.status, {**problem_headers(problem), **(headers or {})}, "application/json"
    )


def problem_headers(problem: Problem) -> dict[str, str]:
    found = {"x-should-retry": "true" if problem.is_worth_retrying else "false"}
    if problem.retry_after_s is not None:
        found["retry-after"] = str(problem.retry_after_s)
    if problem.status == UnauthenticatedError.http_status:
        found["www-authenticate"] = "Bearer"
    return found

"""Every error mii_serve raises on purpose.

    MiiServeError
    ├── InvalidRequestError      the caller's parameters break a rule            INVALID_ARGUMENT     400
    │   └── ContentBlockedError  content safety refuses the text or the picture
    ├── QueueFullError           no room now, try again later                    RESOURCE_EXHAUSTED   429
    │   └── RateLimitedError     this API key has had its share
    ├── NotFoundError            there is no such model, file or route           NOT_FOUND            404
    ├── UnauthenticatedError     no API key, or an unknown one                   UNAUTHENTICATED      401
    ├── PermissionDeniedError    the operator has not allowed this               PERMISSION_DENIED    403
    ├── DeadlineExceededError    the caller's time ran out                       DEADLINE_EXCEEDED    424
    ├── RequestCancelledError    the caller hung up                              CANCELLED            499
    ├── UnsupportedError         this server cannot do that                      UNIMPLEMENTED        501
    ├── UnavailableError         not ready, draining, or unreachable             UNAVAILABLE          503
    │   └── ModerationFailedError content safety gave no verdict, so nothing leaves                   424
    ├── EngineError              the device or the model failed                  INTERNAL             500
    │   ├── NotFiniteError       this picture has values that are not finite
    │   ├── EngineLostError      and the replica has to be started again
    │   ├── PoisonedRequestError replicas crash under this request
    │   └── ProvenanceError      this picture could not be marked or signed, so it is not sent
    ├── ConfigError              a setting breaks a rule; the server will not start
    │   └── UnusableEngineError  this engine cannot run here; another may
    ├── ModelError               the model cannot be found, read or used; the server will not start
    └── VerificationError        the engine does not draw what the reference draws; the server will not start

Each class knows its gRPC code and HTTP status, so that the edges translate an error without looking at its kind. HTTP 408 is
never used: the Azure ML client crashes on it. 424 is what that service's own gateway answers and never retries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

ModerationStage = Literal["input", "output"]
"""What content safety checked: the request's texts, or a picture made from them."""


class MiiServeError(Exception):
    """Root of the tree. `str(error)` is fit to show to the caller. Every error can be pickled and copied."""

    grpc_code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500

    def __reduce__(self) -> tuple[Any, ...]:
        """Without calling `__init__`, whose arguments are not those of `Exception`."""
        return _restore, (type(self), self.args), self.__dict__


def _restore(cls: type[MiiServeError], args: tuple[Any, ...]) -> MiiServeError:
    return cls.__new__(cls, *args)


class InvalidRequestError(MiiServeError):
    """A request parameter breaks a rule; nothing was run."""

    grpc_code = "INVALID_ARGUMENT"
    http_status = 400

    def __init__(self, field: str, rule: str, got: str | None = None) -> None:
        super().__init__(f"{field}: {rule}" + (f", got {got}" if got is not None else ""))
        self.field = field
        self.rule = rule

    def rename(self, field: str) -> None:
        """Name what breaks the rule as the caller of a protocol knows it."""
        text = str(self).removeprefix(f"{self.field}: ")
        self.args = (f"{field}: {text}",)
        self.field = field


class ContentBlockedError(InvalidRequestError):
    """Content safety refuses `field`: a text before any work is done, or a picture before it leaves.

    `categories` has the severity of each category that is above the threshold. The text itself is never repeated.
    INVALID_ARGUMENT, because the same request has the same answer however often it is made.
    """

    def __init__(
        self, field: str, categories: Mapping[str, int], *, stage: ModerationStage = "input", on_blocklist: bool = False
    ) -> None:
        found = [f"{name} {severity}" for name, severity in categories.items()] + ["a blocklist"] * on_blocklist
        super().__init__(field, "refused by content safety: " + (", ".join(found) or "no reason given"))
        self.stage = stage
        self.categories: Mapping[str, int] = dict(categories)
        self.on_blocklist = on_blocklist


class QueueFullError(MiiServeError):
    """No room now. `retry_after_s` are the seconds after which another try is worthwhile, None where that is not known."""

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429

    def __init__(self, text: str, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class RateLimitedError(QueueFullError):
    """The caller's API key has reached its own limit; other callers are not affected. `key_name` is for the server."""

    def __init__(self, text: str, retry_after_s: float | None = None, *, key_name: str | None = None) -> None:
        super().__init__(text, retry_after_s)
        self.key_name = key_name


class NotFoundError(MiiServeError):
    """There is no such route, model, deployment or file here. `code` says which of them to programs."""

    grpc_code = "NOT_FOUND"
    http_status = 404

    def __init__(self, text: str, code: str = "not_found") -> None:
        super().__init__(text)
        self.code = code


class UnauthenticatedError(MiiServeError):
    grpc_code = "UNAUTHENTICATED"
    http_status = 401


class PermissionDeniedError(MiiServeError):
    grpc_code = "PERMISSION_DENIED"
    http_status = 403


class DeadlineExceededError(MiiServeError):
    grpc_code = "DEADLINE_EXCEEDED"
    http_status = 424


class RequestCancelledError(MiiServeError):
    grpc_code = "CANCELLED"
    http_status = 499


class UnsupportedError(MiiServeError):
    grpc_code = "UNIMPLEMENTED"
    http_status = 501


class UnavailableError(MiiServeError):
    grpc_code = "UNAVAILABLE"
    http_status = 503


class ModerationFailedError(UnavailableError):
    """Content safety gave no verdict. 424, as clients retry a 503 several times and the picture may have been made already."""

    http_status = 424


class EngineError(MiiServeError):
    """The device or the model failed."""


class NotFiniteError(EngineError):
    """This picture overflowed on its way and cannot be shown; the text says where and what to do. Others are not affected."""


class EngineLostError(EngineError):
    """The replica is finished. The request is not known to be the cause, so another replica can run it."""


class PoisonedRequestError(EngineError):
    """Replicas crashed while they ran this request; it is not tried again."""


class ProvenanceError(EngineError):
    """The marks that the operator asks for could not be put on this picture, so it does not leave. Others are not affected."""


class ConfigError(MiiServeError):
    """The setting `setting` breaks `rule`."""

    grpc_code = "FAILED_PRECONDITION"

    def __init__(self, setting: str, rule: str) -> None:
        super().__init__(f"{setting}: {rule}")
        self.setting = setting
        self.rule = rule


class UnusableEngineError(ConfigError):
    """The machine, an extension or the model is not what the engine needs; another engine may work."""

    def __init__(self, rule: str) -> None:
        super().__init__("engine", rule)


class ModelError(MiiServeError):
    grpc_code = "FAILED_PRECONDITION"


class VerificationError(MiiServeError):
    """The text names the first stage whose results are not the reference's."""

    grpc_code = "FAILED_PRECONDITION"


def error_for_grpc_code(code: str, reason: str = "") -> type[MiiServeError]:
    """The class a client raises for a status of this name; the root for codes that have no class.

    `reason` is the name of the class that was raised, where the server sent it.
    """
    return _BY_REASON.get((code, reason)) or _BY_GRPC_CODE.get(code, MiiServeError)


_BY_REASON: dict[tuple[str, str], type[MiiServeError]] = {
    (error.grpc_code, error.__name__): error
    for error in (
        EngineLostError,
        ModerationFailedError,
        NotFiniteError,
        PoisonedRequestError,
        ProvenanceError,
        RateLimitedError,
    )
}


_BY_GRPC_CODE: dict[str, type[MiiServeError]] = {
    error.grpc_code: error
    for error in (
        QueueFullError,
        NotFoundError,
        UnauthenticatedError,
        PermissionDeniedError,
        DeadlineExceededError,
        RequestCancelledError,
        UnsupportedError,
        UnavailableError,
        EngineError,
    )
}

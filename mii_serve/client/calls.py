"""What the two transports share: arguments, targets, channel options, failures and readiness. No I/O."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from typing import Generic, TypeVar, cast

import grpc
from grpc_health.v1 import health_pb2

from mii_serve import __version__
from mii_serve.client.messages import OutputFormat, PriorityName, build_request, check_timeout
from mii_serve.errors import (
    ConfigError,
    DeadlineExceededError,
    MiiServeError,
    ModerationFailedError,
    QueueFullError,
    RequestCancelledError,
    UnavailableError,
)
from mii_serve.proto.codec import CHANNEL_OPTIONS
from mii_serve.proto.interceptor import IDEMPOTENCY_KEY, check_idempotency_key
from mii_serve.proto.status import STATUS_DETAILS_KEY, Metadata, decode_error
from mii_serve.proto.v1 import image_generation_pb2 as pb

AnswerT = TypeVar("AnswerT")
StreamT = TypeVar("StreamT")

RETRY_PAUSE_S = 0.2
"""Between two looks at a server that is not ready yet."""

MAX_RETRIES = 2
FIRST_BACKOFF_S = 0.2
LONGEST_PAUSE_S = 60.0
"""A server that wants a longer pause than this is full, which the caller should know."""

Pairs = tuple[tuple[str, str], ...]

OPTIONS: tuple[tuple[str, str | int], ...] = (
    *CHANNEL_OPTIONS,
    ("grpc.primary_user_agent", f"mii_serve/{__version__}"),
    # A server shares its time fairly between connections; two clients in one process are two callers.
    ("grpc.use_local_subchannel_pool", 1),
    # gRPC's own back-off grows to two minutes, far longer than a server takes to come back.
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A server whose machine is gone without a word is noticed while a call waits for it.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


class GenerationCalls(ABC, Generic[AnswerT, StreamT]):
    """The two ways to ask for pictures, with diffusers' names. What is left out gets the model's own defaults."""

    def __init__(self, target: str, api_key: str | None = None, max_retries: int = 0) -> None:
        if not isinstance(target, str) or not target or target.startswith(("http://", "https://", "grpc://")):
            raise ConfigError("target", f"must be HOST:PORT or a gRPC target, got {target!r}")
        self.target = target
        self._max_retries = _checked_retries(max_retries)
        self._metadata: Pairs = ()
        if api_key is not None:
            if not api_key or not api_key.isascii() or not api_key.isprintable():
                raise ConfigError("api_key", "must be printable ASCII text")
            self._metadata = (("authorization", f"Bearer {api_key}"),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.target!r})"

    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int | None = None,
        scheduler: str | None = None,
        output_format: OutputFormat = "png",
        quality: int | None = None,
        embed_metadata: bool = False,
        priority: PriorityName | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
    ) -> AnswerT:
        """Make the pictures of one prompt. `timeout` is in seconds; without one, the call waits for as long as it takes.

        It is made again, as often as the client's `max_retries` and within `timeout`, where the server was not reached, was
        lost, or had no room and said when it will. For ten minutes the same request with the same `idempotency_key` has the
        same answer and is worked on once.

        Raises:
            InvalidRequestError: naming the field and the rule it breaks.
            ContentBlockedError: the server's content safety refuses a text; one of the former.
            DeadlineExceededError: the pictures were not ready in time.
            QueueFullError: the server has no room now.
            UnavailableError: the server is unreachable or not ready.
        """
        request = build_request(
            prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed,
            height=height,
            width=width,
            num_images_per_prompt=num_images_per_prompt,
            scheduler=scheduler,
            output_format=output_format,
            quality=quality,
            embed_metadata=embed_metadata,
            priority=priority,
        )
        return self._generate(request, check_timeout(timeout), self._metadata_for(idempotency_key))

    def stream(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int | None = None,
        scheduler: str | None = None,
        output_format: OutputFormat = "png",
        quality: int | None = None,
        embed_metadata: bool = False,
        priority: PriorityName | None = None,
        preview_every: int | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
    ) -> StreamT:
        """`generate`, told as events while it happens. The errors come from the iteration; nothing is made again by itself.

        With `preview_every`, an unfinished image is shown after every so many UNet calls, less often on a busy server.
        """
        request = build_request(
            prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed,
            height=height,
            width=width,
            num_images_per_prompt=num_images_per_prompt,
            scheduler=scheduler,
            output_format=output_format,
            quality=quality,
            embed_metadata=embed_metadata,
            priority=priority,
            preview_every=preview_every,
        )
        return self._stream(request, check_timeout(timeout), self._metadata_for(idempotency_key))

    @abstractmethod
    def _generate(self, request: pb.GenerateRequest, timeout: float | None, metadata: Pairs) -> AnswerT: ...

    @abstractmethod
    def _stream(self, request: pb.GenerateRequest, timeout: float | None, metadata: Pairs) -> StreamT: ...

    def _metadata_for(self, idempotency_key: str | None) -> Pairs:
        if idempotency_key is None:
            return self._metadata
        return (*self._metadata, (IDEMPOTENCY_KEY, check_idempotency_key(idempotency_key)))


def _checked_retries(max_retries: int) -> int:
    if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
        raise ConfigError("max_retries", f"must be a whole number, 0 or more, got {max_retries!r}")
    return max_retries


class Attempts:
    """How often one call is made, and with how much time.

    Only what did no harm is tried again: a picture is a function of its parameters, so a call whose answer was lost may be
    repeated, and a server without room may be asked when it said it will have some. Not so a picture that nobody could look at:
    it would be made once more only to be withheld again.
    """

    def __init__(self, max_retries: int, timeout: float | None) -> None:
        self._num_left = max_retries
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._backoff_s = FIRST_BACKOFF_S

    @property
    def left_s(self) -> float | None:
        """Seconds for the next attempt."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def pause_s(self, error: MiiServeError) -> float:
        """How long to wait before the next attempt.

        Raises:
            MiiServeError: the same error, where there is to be none.
        """
        if isinstance(error, QueueFullError) and error.retry_after_s is not None:
            pause_s = error.retry_after_s
        elif isinstance(error, UnavailableError) and not isinstance(error, ModerationFailedError):
            pause_s = self._backoff_s
            self._backoff_s *= 2
        else:
            raise error
        pause_s *= random.uniform(1.0, 1.25)  # those who were refused together do not come back together
        left_s = self.left_s
        if self._num_left == 0 or pause_s > (LONGEST_PAUSE_S if left_s is None else min(left_s, LONGEST_PAUSE_S)):
            raise error
        self._num_left -= 1
        return pause_s


def typed_error(error: grpc.RpcError, target: str) -> MiiServeError:
    """The error to raise for a failed call: the server's own, or what gRPC found out without an answer from it."""
    call = cast(grpc.Call, error)  # every error that gRPC raises is also the call it ended
    code, text = call.code(), call.details() or ""
    # The two stub packages disagree about the metadata's type; at run time it is pairs.
    trailing = cast("Metadata | None", call.trailing_metadata())
    if not any(key == STATUS_DETAILS_KEY for key, _ in trailing or ()):
        if code is grpc.StatusCode.UNAVAILABLE:
            return UnavailableError(f"no answer from {target}: {text or 'unavailable'}")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceededError(f"no answer from {target} in time")
    return decode_error(code, text, trailing)


def cancelled_here() -> RequestCancelledError:
    return RequestCancelledError("the caller cancelled the request")


def closed_client(client: object) -> RuntimeError:
    return RuntimeError(f"{client!r} is closed")


HEALTH_OF_ALL = health_pb2.HealthCheckRequest(service="")


def health_name(answer: health_pb2.HealthCheckResponse) -> str:
    """The status's name; UNKNOWN for one that only a newer server knows."""
    names: dict[int, str] = {number: name for name, number in health_pb2.HealthCheckResponse.ServingStatus.items()}
    return names.get(answer.status, "UNKNOWN")


class Readiness:
    """What `wait_ready` has seen so far, and what to say if its time runs out."""

    def __init__(self, target: str, timeout: float) -> None:
        self._target = target
        self._timeout = timeout
        self._last = ""

    def is_ready(self, answer: health_pb2.HealthCheckResponse) -> bool:
        self._last = f"its health is {health_name(answer)}"
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def broke(self, error: grpc.RpcError) -> None:
        """Note a look that failed for want of an answer.

        Raises:
            MiiServeError: the failure is another one, and waiting does not mend it.
        """
        failure = typed_error(error, self._target)
        if isinstance(failure, DeadlineExceededError):
            return
        if not isinstance(failure, UnavailableError):
            raise failure from error
        self._last = str(failure)

    def gave_up(self) -> UnavailableError:
        reason = self._last or "no answer"
        return UnavailableError(f"{self._target} is not ready after {self._timeout:g} s: {reason}")

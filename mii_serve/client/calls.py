"""What the two clients share: how a call is written, read and fails. No I/O."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, TypeVar, Unpack, cast

import grpc

from mii_serve import __version__
from mii_serve.client.arguments import (
    GenerateOptions,
    StreamOptions,
    build_request,
    check_names,
    check_timeout,
    lists_options,
)
from mii_serve.client.results import Event, GenerationResult, ResultBuilder
from mii_serve.client.retries import checked_retries
from mii_serve.errors import (
    ConfigError,
    DeadlineExceededError,
    MiiServeError,
    RequestCancelledError,
    UnavailableError,
)
from mii_serve.proto.codec import CHANNEL_OPTIONS, decode_answer, decode_event, encode_request
from mii_serve.proto.metadata import (
    AUTHORIZATION_KEY,
    IDEMPOTENCY_KEY,
    STATUS_DETAILS_KEY,
    TIMEOUT_KEY,
    check_idempotency_key,
)
from mii_serve.proto.status import Metadata, decode_error
from mii_serve.proto.v1 import image_generation_pb2 as pb

AnswerT = TypeVar("AnswerT")
StreamT = TypeVar("StreamT")

Pairs = tuple[tuple[str, str], ...]

OPTIONS: tuple[tuple[str, str | int], ...] = (
    *CHANNEL_OPTIONS,
    ("grpc.primary_user_agent", f"mii_serve/{__version__}"),
    # A server shares its time fairly between connections; two clients in one process are two callers.
    ("grpc.use_local_subchannel_pool", 1),
    # gRPC's own back-off grows to two minutes, far longer than a server takes to come back.
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A call that waits notices that the server's machine has disappeared.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),  # which gRPC 1.85 waits for instead
)

_SEVERAL_SERVERS = ("dns:", "ipv4:", "ipv6:")
"""Schemes of targets that name several servers: `dns:///NAME:PORT`, `ipv4:ADDRESS:PORT,ADDRESS:PORT`."""
_TAKE_TURNS = ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}')


def channel_options(target: str) -> tuple[tuple[str, str | int], ...]:
    """Calls take turns between the servers of a target that names several; any other target is one server, one connection."""
    return (*OPTIONS, _TAKE_TURNS) if target.startswith(_SEVERAL_SERVERS) else OPTIONS


class GenerationCalls(ABC, Generic[AnswerT, StreamT]):
    """The two ways to ask for images, with diffusers' names. What is left out gets the model's own defaults."""

    def __init__(self, target: str, api_key: str | None = None, max_retries: int = 0) -> None:
        if not isinstance(target, str) or not target or target.startswith(("http://", "https://", "grpc://")):
            raise ConfigError("target", f"must be HOST:PORT or a gRPC target, got {target!r}")
        self.target = target
        self._max_retries = checked_retries(max_retries)
        self._metadata: Pairs = ()
        if api_key is not None:
            if not api_key or not api_key.isascii() or not api_key.isprintable():
                raise ConfigError("api_key", "must be printable ASCII text")
            self._metadata = ((AUTHORIZATION_KEY, f"Bearer {api_key}"),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.target!r})"

    @lists_options(GenerateOptions)
    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> AnswerT:
        """Make the images of one prompt. `timeout` is in seconds; without one, the call waits for as long as it takes.

        The call is retried, at most `max_retries` times and within `timeout`, where the server was not reached, was lost, or
        had no room and said when it will have some. For ten minutes the same request with the same `idempotency_key` gets the
        same answer and is worked on once.

        Raises:
            InvalidRequestError: naming the field and the rule it breaks.
            ContentBlockedError: the server's content safety refuses a text; one of the former.
            DeadlineExceededError: the images were not ready in time.
            QueueFullError: the server has no room now.
            UnavailableError: the server is unreachable or not ready.
        """
        check_names("generate", prompt, options, GenerateOptions)
        return self._generate(*self._arguments(prompt, options))

    @lists_options(StreamOptions)
    def stream(self, prompt: str | None = None, **options: Unpack[StreamOptions]) -> StreamT:
        """Make the images of one prompt, and yield what happens to them as events. The arguments are those of `generate`.

        With `preview_every`, an unfinished image is shown after every so many UNet calls, less often on a busy server. The
        iteration raises the errors; a stream is not retried.
        """
        check_names("stream", prompt, options, StreamOptions)
        return self._stream(*self._arguments(prompt, options))

    @abstractmethod
    def _generate(self, request: pb.GenerateRequest, timeout: float | None, metadata: Pairs) -> AnswerT: ...

    @abstractmethod
    def _stream(self, request: pb.GenerateRequest, timeout: float | None, metadata: Pairs) -> StreamT: ...

    def _arguments(self, prompt: str | None, options: Mapping[str, Any]) -> tuple[pb.GenerateRequest, float | None, Pairs]:
        """What a call sends: the message, the seconds it may take, and the metadata."""
        metadata = self._metadata
        if (key := options.get("idempotency_key")) is not None:
            metadata = (*metadata, (IDEMPOTENCY_KEY, check_idempotency_key(key)))
        return encode_request(build_request(prompt, options)), check_timeout(options.get("timeout")), metadata


def with_timeout(metadata: Pairs, timeout: float | None) -> Pairs:
    """The metadata of a call with this deadline."""
    return metadata if timeout is None else (*metadata, (TIMEOUT_KEY, f"{max(timeout, 0.001):.3f}"))


class StreamCall:
    """One call of `GenerateStream`: decodes its messages and cancels it. The two streams add how it is read."""

    def __init__(self, call: Any, target: str) -> None:
        self._call = call
        self._target = target
        self._builder = ResultBuilder()
        self._is_cancelled = False

    @property
    def request_id(self) -> str:
        """The server's name for the request; empty until the first event."""
        return self._builder.request_id

    def cancel(self) -> None:
        """Tell the server to stop; nothing happens if the request is over."""
        self._is_cancelled = bool(self._call.cancel()) or self._is_cancelled

    def _event(self, message: pb.GenerateEvent) -> Event | None:
        """The event in the message, with its image decoded; None for a kind that only a newer server knows."""
        self._builder.request_id = message.request_id
        event = decode_event(message)
        return None if event is None else self._builder.add(event)

    def _error(self, error: grpc.RpcError) -> MiiServeError:
        return cancelled_here() if self._is_cancelled else typed_error(error, self._target)


def result_of(message: pb.GenerateResponse) -> GenerationResult:
    """Read a unary answer.

    Raises:
        MiiServeError: an image cannot be read, or is missing.
    """
    answer = decode_answer(message)
    return ResultBuilder(message.request_id).add_all((*answer.images, answer.done))


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

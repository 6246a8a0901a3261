"""Sends requests over `mii_serve.v1` as streams, whose events date a request's start, first step and first preview."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio

from mii_serve.bench.values import BAD_ANSWER, OK, UNREACHABLE, Answer, PlannedRequest, ReceivedPicture
from mii_serve.client.calls import OPTIONS, Pairs, typed_error
from mii_serve.errors import InvalidRequestError, MiiServeError
from mii_serve.proto.codec import decode_event, decode_server_info, encode_request
from mii_serve.proto.metadata import STATUS_DETAILS_KEY
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationStub
from mii_serve.types import (
    Done,
    GenerationRequest,
    ImageFormat,
    ImageReady,
    OutputOptions,
    Preview,
    ServerInfo,
    Started,
    Step,
)

INFO_TIMEOUT_S = 10.0


class GrpcDriver:
    """Implements `load.Driver`. Pictures come as PNG, the default format."""

    def __init__(self, target: str, *, credentials: grpc.ChannelCredentials | None = None, metadata: Pairs = ()) -> None:
        self._target, self._metadata = target, metadata
        self._channel = open_channel(target, credentials)
        self._stub: Any = ImageGenerationStub(self._channel)

    async def ask(self, request: PlannedRequest, timeout_s: float) -> Answer:
        clock = asyncio.get_running_loop().time
        first: dict[type, float] = {}
        pictures: dict[int, ReceivedPicture] = {}
        asked = GenerationRequest(params=request.asked, output=OutputOptions(preview_every=request.preview_every))
        try:
            call = self._stub.GenerateStream(encode_request(asked), timeout=timeout_s, metadata=self._metadata)
            while (message := await call.read()) is not grpc.aio.EOF:
                event = decode_event(message)
                first.setdefault(type(event), clock())
                if isinstance(event, ImageReady):
                    pictures[event.image_index] = _received(event)
        except grpc.RpcError as error:
            return Answer(code=code_of(error), text=str(typed_error(error, self._target)))
        except InvalidRequestError as error:  # a value that the message's field cannot hold
            return Answer(code=error.grpc_code, text=str(error))
        except MiiServeError as error:  # of a newer server
            return Answer(code=BAD_ANSWER, text=str(error))
        return Answer(
            code=OK if Done in first else "CANCELLED",
            text="" if Done in first else "the stream ended before the request was done",
            pictures=tuple(pictures[index] for index in sorted(pictures)),
            started_at=first.get(Started),
            first_step_at=first.get(Step),
            first_preview_at=first.get(Preview),
        )

    async def server_info(self) -> ServerInfo:
        """What the server reports of itself.

        Raises:
            MiiServeError: it does not answer.
        """
        try:
            call = self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=INFO_TIMEOUT_S, metadata=self._metadata)
            return decode_server_info(await call)
        except grpc.RpcError as error:
            raise typed_error(error, self._target) from error

    async def close(self) -> None:
        await self._channel.close()


def open_channel(target: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """A channel with the SDK's options; without credentials, plain text."""
    if credentials is None:
        return grpc.aio.insecure_channel(target, list(OPTIONS))
    return grpc.aio.secure_channel(target, credentials, list(OPTIONS))


def code_of(error: grpc.RpcError) -> str:
    """The status's name. gRPC reports a missing connection as UNAVAILABLE, too; a server of ours adds error details to it."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return "UNKNOWN"
    has_details = any(key == STATUS_DETAILS_KEY for key, _ in error.trailing_metadata() or ())
    return UNREACHABLE if error.code() is grpc.StatusCode.UNAVAILABLE and not has_details else error.code().name


def _received(image: ImageReady) -> ReceivedPicture:
    is_raw = image.format is ImageFormat.RAW_RGB
    return ReceivedPicture(encoded=image.encoded, raw_size=(image.width, image.height) if is_raw else None)

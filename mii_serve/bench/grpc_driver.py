"""Asks over `mii_serve.v1`, as a stream, so that every request also tells when it started, stepped and showed something."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio

from mii_serve.bench.values import OK, UNREACHABLE, Answer, PlannedRequest, Shown
from mii_serve.client import ServerInfo
from mii_serve.client.calls import OPTIONS, Pairs, typed_error
from mii_serve.client.messages import decode_server_info
from mii_serve.errors import InvalidRequestError
from mii_serve.proto.codec import encode_request, image_format_number
from mii_serve.proto.status import STATUS_DETAILS_KEY
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationStub
from mii_serve.types import ImageFormat, OutputOptions

INFO_TIMEOUT_S = 10.0
_RAW = image_format_number(ImageFormat.RAW_RGB)


class GrpcDriver:
    """Implements `load.Driver`; pictures come as PNG, which is what a caller gets who names no format."""

    def __init__(self, target: str, *, credentials: grpc.ChannelCredentials | None = None, metadata: Pairs = ()) -> None:
        self._target, self._metadata = target, metadata
        options = list(OPTIONS)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options)
        self._stub: Any = ImageGenerationStub(self._channel)

    async def ask(self, request: PlannedRequest, timeout_s: float) -> Answer:
        clock = asyncio.get_running_loop().time
        first: dict[str, float] = {}
        pictures: dict[int, Shown] = {}
        try:
            message = encode_request(request.asked, OutputOptions(preview_every=request.preview_every))
            call = self._stub.GenerateStream(message, timeout=timeout_s, metadata=self._metadata)
            while (event := await call.read()) is not grpc.aio.EOF:
                kind = event.WhichOneof("event")
                first.setdefault(kind, clock())
                if kind == "image":
                    pictures[event.image.index] = shown(event.image)
        except grpc.RpcError as error:
            return Answer(code=code_of(error), text=str(typed_error(error, self._target)))
        except InvalidRequestError as error:  # no message could carry it
            return Answer(code=error.grpc_code, text=str(error))
        return Answer(
            code=OK if "done" in first else "CANCELLED",
            text="" if "done" in first else "the stream ended before the request was done",
            pictures=tuple(pictures[index] for index in sorted(pictures)),
            started_at=first.get("started"),
            first_step_at=first.get("step"),
            first_preview_at=first.get("preview"),
        )

    async def server_info(self) -> ServerInfo:
        """What the server says of itself.

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


def code_of(error: grpc.RpcError) -> str:
    """The status's name. UNAVAILABLE is gRPC's word for no connection, too: a server of ours that says it adds details."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return "UNKNOWN"
    is_told = any(key == STATUS_DETAILS_KEY for key, _ in error.trailing_metadata() or ())
    return UNREACHABLE if error.code() is grpc.StatusCode.UNAVAILABLE and not is_told else error.code().name


def shown(image: pb.GeneratedImage) -> Shown:
    return Shown(encoded=image.data, raw_size=(image.width, image.height) if image.format == _RAW else None)

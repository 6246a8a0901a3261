"""The public v1 service over gRPC: decodes its messages, and encodes the dispatcher's events as messages."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

import grpc

from mii_serve.errors import InvalidRequestError
from mii_serve.proto.codec import decode_request, encode_answer, encode_event, encode_server_info
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationServicer, add_ImageGenerationServicer_to_server
from mii_serve.server.bounded_write import Context
from mii_serve.server.call import current_call
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.types import ImageReady

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["ImageGeneration"].full_name


class FrontService(ImageGenerationServicer):
    """Runs inside `CallInterceptor`, which has admitted the call."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def add_to(self, server: grpc.aio.Server) -> None:
        add_ImageGenerationServicer_to_server(self, server)

    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> AsyncGenerator[pb.GenerateEvent, None]:  # noqa: N802
        call = current_call.get()
        async with contextlib.aclosing(self._dispatcher.events(decode_request(request), call)) as events:
            async for event in events:
                if isinstance(event, ImageReady):
                    context.set_trailing_metadata(tuple(self._dispatcher.provenance_headers(event).items()))
                yield encode_event(call.request_id, event)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:  # noqa: N802
        call, decoded = current_call.get(), decode_request(request)
        if decoded.output.preview_every is not None:
            raise InvalidRequestError("output.preview_every", "needs GenerateStream, which can show previews")
        answer = await self._dispatcher.generate(decoded, call)
        context.set_trailing_metadata(tuple(self._dispatcher.provenance_headers(answer.images[0]).items()))
        return encode_answer(call.request_id, answer)

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:  # noqa: N802
        return encode_server_info(await self._dispatcher.server_info())

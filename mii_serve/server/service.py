"""The public v1 service over gRPC: the desk's answers as `mii_serve.v1` messages."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from mii_serve.errors import InvalidRequestError
from mii_serve.proto.codec import gather_response
from mii_serve.proto.interceptor import (
    CLIENT_ID_KEY,
    IDEMPOTENCY_KEY,
    check_client_id,
    current_facts,
    current_key_name,
    current_request_id,
)
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationServicer
from mii_serve.proto.writing import Context, address_of
from mii_serve.server.desk import Desk, Visit, client_of, deadline_in
from mii_serve.server.ledger import Facts


class FrontService(ImageGenerationServicer):
    """Runs inside `CallInterceptor`, which has given the call its id and let it in."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> AsyncGenerator[pb.GenerateEvent, None]:  # noqa: N802
        async with contextlib.aclosing(self._desk.events(request, visit_of(context))) as events:
            async for event in events:
                yield event

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:  # noqa: N802
        if request.output.HasField("preview_every"):
            raise InvalidRequestError("output.preview_every", "needs GenerateStream, which can show previews")
        async with contextlib.aclosing(self._desk.events(request, visit_of(context))) as events:
            return gather_response([event async for event in events])

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:  # noqa: N802
        return await self._desk.server_info()


def visit_of(context: Context) -> Visit:
    """The circumstances of the call that is being answered.

    Raises:
        InvalidRequestError: its metadata breaks a rule.
    """
    metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
    key_name, facts = current_key_name.get(), current_facts.get(None)
    return Visit(
        request_id=current_request_id.get(),
        client=client_of(key_name, check_client_id(metadata.get(CLIENT_ID_KEY)), address_of(str(context.peer()))),
        deadline=deadline_in(context.time_remaining()),
        key_name=key_name,
        idempotency_key=metadata.get(IDEMPOTENCY_KEY),
        facts=facts if isinstance(facts, Facts) else Facts(),
    )

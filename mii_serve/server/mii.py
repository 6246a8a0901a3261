"""DeepSpeed-MII's service, for its clients as they are: a picture call is answered by the desk, the rest is refused by name.

The prompts of one call are requests of their own, made side by side. They end together: one that fails ends the others, and a
caller who leaves ends them all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf import empty_pb2

from mii_serve.errors import InvalidRequestError, PermissionDeniedError, UnsupportedError
from mii_serve.proto.codec import encode_request, gather_response
from mii_serve.proto.dropped import dropped_headers
from mii_serve.proto.interceptor import IDEMPOTENCY_KEY, MII_PACKAGES, REQUEST_ID_KEY, Context
from mii_serve.proto.mii_codec import MiiRequest, encode_mii_reply, parse_mii_request, resolve_mii_request
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.server.desk import Desk, Visit
from mii_serve.server.service import visit_of
from mii_serve.types import GenerationParams, ImageFormat, OutputOptions, draw_seed

logger = logging.getLogger(__name__)

MII_SERVICES = tuple(f"{package}.ModelResponse" for package in MII_PACKAGES)

NOT_SERVED = (
    "ClassificationReply",
    "ConversationalReply",
    "CreateSession",
    "DestroySession",
    "FillMaskReply",
    "GeneratorReply",
    "InpaintingReply",
    "QuestionAndAnswerReply",
    "TokenClassificationReply",
    "ZeroShotImgClassificationReply",
)
"""MII's other tasks. Its own server runs the picture pipeline for some of them and sends back the text of a Python object."""

MAX_ID_CHARS = 100
_RAW = OutputOptions(format=ImageFormat.RAW_RGB)


class MiiService:
    """Runs inside `CallInterceptor`, as `FrontService` does."""

    def __init__(self, desk: Desk, on_terminate: Callable[[], None] | None = None) -> None:
        """`on_terminate` is what MII's `Terminate` does; without it the call is refused."""
        self._desk = desk
        self._on_terminate = on_terminate

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """What a gRPC server needs to know of this service, under each of its names."""
        methods = {
            "Txt2ImgReply": _unary(self._make, parse_mii_request),
            "Terminate": _unary(self._terminate, empty_pb2.Empty.FromString),
            **{name: _unary(_refusal_of(name), bytes) for name in NOT_SERVED},
        }
        return tuple(grpc.method_handlers_generic_handler(service, methods) for service in MII_SERVICES)

    async def _make(self, request: MiiRequest, context: Context) -> bytes:
        called_at, visit = time.monotonic(), visit_of(context)
        if visit.idempotency_key is not None:
            raise InvalidRequestError(IDEMPOTENCY_KEY, "is not for MII's calls; Generate takes it")
        wanted = resolve_mii_request(request, self._desk.capabilities, fallback_seed=draw_seed())
        visits = _visits(visit, len(wanted))
        visit.facts["num_prompts"] = len(wanted)
        try:
            async with asyncio.TaskGroup() as group:
                parts = [group.create_task(self._part(*part)) for part in zip(wanted, visits, strict=True)]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            visit.facts.learn_params(wanted[0])  # each part has told its own
        answers = [part.result() for part in parts]
        context.set_trailing_metadata(tuple(dropped_headers([answer.parameters for answer in answers]).items()))
        images = [image for answer in answers for image in answer.images]
        return encode_mii_reply(images, time.monotonic() - called_at)

    async def _part(self, params: GenerationParams, visit: Visit) -> pb.GenerateResponse:
        async with contextlib.aclosing(self._desk.events(encode_request(params, _RAW), visit)) as events:
            return gather_response([event async for event in events])

    async def _terminate(self, request: empty_pb2.Empty, context: Context) -> bytes:
        if self._on_terminate is None:
            raise PermissionDeniedError("Terminate is turned off; the operator stops the server, or sets enable_mii_terminate")
        visit = visit_of(context)
        logger.warning("draining: %s called Terminate, request_id=%s", visit.client, visit.request_id)
        self._on_terminate()
        return request.SerializeToString()


def _unary(
    answer: Callable[[Any, Context], Awaitable[bytes]], parse: Callable[[bytes], Any]
) -> grpc.RpcMethodHandler[Any, Any]:
    return grpc.unary_unary_rpc_method_handler(answer, parse)


def _refusal_of(name: str) -> Callable[[bytes, Context], Awaitable[bytes]]:
    async def refuse(wire: bytes, context: Context) -> bytes:
        raise UnsupportedError(f"{name} is not served here: this server makes pictures from text, with Txt2ImgReply")

    return refuse


def _visits(visit: Visit, num_prompts: int) -> list[Visit]:
    """A visit for each prompt: an id of its own, everything else the call's."""
    if num_prompts == 1:
        return [visit]
    ids = [f"{visit.request_id}-{i}" for i in range(num_prompts)]
    if len(ids[-1]) > MAX_ID_CHARS:
        rule = f"must be at most {MAX_ID_CHARS - len(str(num_prompts - 1)) - 1} characters, so that each prompt gets one"
        raise InvalidRequestError(REQUEST_ID_KEY, rule)
    return [replace(visit, request_id=request_id) for request_id in ids]

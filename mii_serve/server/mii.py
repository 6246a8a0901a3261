"""DeepSpeed-MII's service, for its clients as they are: an image call goes to the dispatcher, the rest is refused by name.

The prompts of one call are requests of their own, made side by side. They end together: one that fails ends the others, and a
caller who leaves ends them all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from google.protobuf import empty_pb2

from mii_serve.errors import InvalidRequestError, PermissionDeniedError, UnsupportedError
from mii_serve.proto.metadata import IDEMPOTENCY_KEY
from mii_serve.proto.mii_codec import MII_PACKAGES, decode_mii_request, encode_mii_reply, parse_mii_request
from mii_serve.proto.mii_codec import MiiRequest as MiiRequest
from mii_serve.server.bounded_write import Context
from mii_serve.server.call import CallContext, current_call
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.dropped_text import dropped_headers
from mii_serve.types import GenerationAnswer, ResolvedRequest, draw_seed

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


async def draw_pictures(
    dispatcher: Dispatcher,
    request: MiiRequest,
    call: CallContext,
    check: Callable[[Sequence[ResolvedRequest]], None] = lambda requests: None,
) -> list[GenerationAnswer]:
    """The raw pictures of each prompt, in order; `check` may refuse what is asked for.

    Raises:
        MiiServeError: of the first prompt that failed.
    """
    if call.idempotency_key is not None:
        raise InvalidRequestError(IDEMPOTENCY_KEY, "is not for MII's calls; Generate takes it")
    requests = decode_mii_request(request, dispatcher.resolve, fallback_seed=draw_seed())
    check(requests)
    calls = [call] if len(requests) == 1 else [call.for_part(i, "-") for i in range(len(requests))]
    call.log["num_prompts"] = len(requests)
    try:
        async with asyncio.TaskGroup() as group:
            parts = [group.create_task(dispatcher.generate(one, part)) for one, part in zip(requests, calls, strict=True)]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    finally:
        call.log.add_params(requests[0].params)  # each part has logged its own
    return [part.result() for part in parts]


class MiiService:
    """Runs inside `CallInterceptor`, as `FrontService` does."""

    def __init__(self, dispatcher: Dispatcher, on_terminate: Callable[[], None] | None = None) -> None:
        """`on_terminate` is what MII's `Terminate` does; without it the call is refused."""
        self._dispatcher = dispatcher
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
        call = current_call.get()
        answers = await draw_pictures(self._dispatcher, request, call)
        provenance = self._dispatcher.provenance_headers(answers[0].images[0])
        context.set_trailing_metadata((*dropped_headers([one.parameters for one in answers]).items(), *provenance.items()))
        return encode_mii_reply([image for answer in answers for image in answer.images], call.seconds)

    async def _terminate(self, request: empty_pb2.Empty, context: Context) -> bytes:
        if self._on_terminate is None:
            raise PermissionDeniedError("Terminate is turned off; the operator stops the server, or sets enable_mii_terminate")
        call = current_call.get()
        logger.warning("draining: %s called Terminate, request_id=%s", call.client, call.request_id)
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

"""The v1 service as a replica speaks it, on its private socket, to the front process."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc

import mii_serve
from mii_serve.proto.codec import (
    CHANNEL_OPTIONS,
    GET_METRICS,
    decode_request,
    encode_event,
    encode_server_info,
    gather_response,
)
from mii_serve.proto.interceptor import CLIENT_ID_KEY, CallInterceptor, current_request_id
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationServicer, add_ImageGenerationServicer_to_server
from mii_serve.proto.writing import Context
from mii_serve.replica.loop import ReplicaLoop
from mii_serve.tracing import TRACEPARENT_KEY
from mii_serve.types import RequestedParams, draw_seed


def replica_server(loop: ReplicaLoop, deployment_name: str, socket: Path) -> grpc.aio.Server:
    """A server, not yet started, that speaks for this loop on a private socket."""
    server = grpc.aio.server(interceptors=(CallInterceptor(is_inner=True),), options=CHANNEL_OPTIONS)
    add_ImageGenerationServicer_to_server(ReplicaService(loop, deployment_name), server)
    server.add_generic_rpc_handlers((_internal_handler(loop),))
    server.add_insecure_port(f"unix:{socket}")
    return server


def _internal_handler(loop: ReplicaLoop) -> grpc.GenericRpcHandler:
    """What the front asks beside the public service."""

    async def get_metrics(request: bytes, context: Context) -> bytes:
        return loop.metrics.text()

    service, _, method = GET_METRICS.strip("/").partition("/")
    handlers: dict[str, Any] = {method: grpc.unary_unary_rpc_method_handler(get_metrics)}
    return grpc.method_handlers_generic_handler(service, handlers)


class ReplicaService(ImageGenerationServicer):
    def __init__(self, loop: ReplicaLoop, deployment_name: str) -> None:
        self._loop = loop
        self._deployment_name = deployment_name
        engine = loop.engine
        usual = engine.capabilities.resolve(RequestedParams(prompt="the default scheduler"), fallback_seed=0)
        self._default_scheduler = engine.describe_scheduler(usual)

    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> AsyncGenerator[pb.GenerateEvent, None]:  # noqa: N802
        params, output, priority = decode_request(request, self._loop.engine.capabilities, fallback_seed=draw_seed())
        request_id = current_request_id.get()
        metadata = dict(context.invocation_metadata() or ())
        events = self._loop.generate(
            request_id,
            params,
            output,
            client=str(metadata.get(CLIENT_ID_KEY, "")),
            priority=priority,
            timeout_s=context.time_remaining(),
            traceparent=str(metadata[TRACEPARENT_KEY]) if TRACEPARENT_KEY in metadata else None,
        )
        async with contextlib.aclosing(events):
            async for event in events:
                yield encode_event(request_id, event)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:  # noqa: N802
        async with contextlib.aclosing(self.GenerateStream(request, context)) as events:
            return gather_response([event async for event in events])

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:  # noqa: N802
        engine = self._loop.engine
        return encode_server_info(
            version=mii_serve.__version__,
            deployment_name=self._deployment_name,
            engine=engine.description,
            capabilities=engine.capabilities,
            default_scheduler=self._default_scheduler,
            activity=self._loop.activity(),
        )

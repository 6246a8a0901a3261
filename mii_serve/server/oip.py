"""The Open Inference Protocol over gRPC, as KServe and Triton's clients speak it: `inference.GRPCInferenceService`.

What a request means is in `open_inference.py`. Calls that would change the server, or have it open its callers' memory, are
refused by name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from mii_serve import __version__
from mii_serve.errors import UnsupportedError
from mii_serve.proto.oip_codec import (
    encode_config,
    encode_index,
    encode_infer_response,
    encode_live,
    encode_metadata,
    encode_ready,
    encode_server,
    parse_infer_request,
    parse_model_reference,
)
from mii_serve.server.bounded_write import Context
from mii_serve.server.call import current_call
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.dropped_text import dropped_headers
from mii_serve.server.model_names import ModelNames
from mii_serve.server.open_inference import EXTENSIONS, SERVER_NAME, OpenInference
from mii_serve.types.open_inference import InferRequest

OIP_SERVICE = "inference.GRPCInferenceService"
OIP_PROBES = frozenset({f"/{OIP_SERVICE}/ServerLive", f"/{OIP_SERVICE}/ServerReady"})
"""Open to all, as health is."""

_FIXED_MODEL = "the model is the one that this server was started with"
_NO_SHARED_MEMORY = "this server opens no memory of its callers; send tensors as raw_input_contents"
REFUSED = {
    "ModelStreamInfer": "send ModelInfer; steps and previews come from mii_serve.v1.ImageGeneration/GenerateStream",
    "ModelStatistics": "the server's statistics are at /metrics of the HTTP port",
    "RepositoryModelLoad": _FIXED_MODEL,
    "RepositoryModelUnload": _FIXED_MODEL,
    **{
        f"{kind}SharedMemory{verb}": _NO_SHARED_MEMORY
        for kind in ("System", "Cuda")
        for verb in ("Status", "Register", "Unregister")
    },
    "TraceSetting": "traces are a setting of the server's operator",
    "LogSettings": "the log is a setting of the server's operator",
}
"""Methods that are not served, and why."""


class OipService:
    """Runs inside `CallInterceptor`, as `FrontService` does."""

    def __init__(self, dispatcher: Dispatcher, names: ModelNames) -> None:
        self._dispatcher = dispatcher
        self._inference = OpenInference(dispatcher, names)

    def handler(self) -> grpc.GenericRpcHandler:
        """What a gRPC server needs to know of this service."""
        methods = {
            "ServerLive": _unary(self._live, bytes),
            "ServerReady": _unary(self._ready, bytes),
            "ServerMetadata": _unary(self._server, bytes),
            "ModelReady": _unary(self._model_ready, parse_model_reference),
            "ModelMetadata": _unary(self._metadata, parse_model_reference),
            "ModelConfig": _unary(self._config, parse_model_reference),
            "RepositoryIndex": _unary(self._index, bytes),
            "ModelInfer": _unary(self._infer, parse_infer_request),
            **{name: _unary(_refusal_of(name, why), bytes) for name, why in REFUSED.items()},
        }
        return grpc.method_handlers_generic_handler(OIP_SERVICE, methods)

    async def _live(self, request: bytes, context: Context) -> bytes:
        return encode_live()

    async def _ready(self, request: bytes, context: Context) -> bytes:
        return encode_ready(self._inference.is_ready)

    async def _server(self, request: bytes, context: Context) -> bytes:
        return encode_server(SERVER_NAME, __version__, EXTENSIONS)

    async def _model_ready(self, model: tuple[str, str], context: Context) -> bytes:
        return encode_ready(await self._inference.is_model_ready(*model))

    async def _metadata(self, model: tuple[str, str], context: Context) -> bytes:
        return encode_metadata(await self._inference.describe(*model))

    async def _config(self, model: tuple[str, str], context: Context) -> bytes:
        return encode_config(await self._inference.describe(*model))

    async def _index(self, request: bytes, context: Context) -> bytes:
        return encode_index(await self._inference.names(), self._inference.is_ready)

    async def _infer(self, request: InferRequest, context: Context) -> bytes:
        response, answers = await self._inference.infer(request, current_call.get())
        headers = dropped_headers([answer.parameters for answer in answers])
        headers |= self._dispatcher.provenance_headers(answers[0].images[0])
        context.set_trailing_metadata(tuple(headers.items()))
        return await asyncio.to_thread(encode_infer_response, response)


def _unary(
    answer: Callable[[Any, Context], Awaitable[bytes]], parse: Callable[[bytes], Any]
) -> grpc.RpcMethodHandler[Any, Any]:
    return grpc.unary_unary_rpc_method_handler(answer, parse)


def _refusal_of(name: str, why: str) -> Callable[[bytes, Context], Awaitable[bytes]]:
    async def refuse(wire: bytes, context: Context) -> bytes:
        raise UnsupportedError(f"{name} is not served here: {why}")

    return refuse

"""The Open Inference Protocol over HTTP, as KServe and Triton's clients speak it: `/v2` and what is below it.

A body is JSON or, with the header `Inference-Header-Content-Length`, so many bytes of JSON and then the raw elements of those
tensors that say so. In JSON an image is a PNG in base64, in raw elements the PNG itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mii_serve import __version__
from mii_serve.config import HttpConfig
from mii_serve.errors import InvalidRequestError, MiiServeError, UnavailableError
from mii_serve.gateway.errors import MediaTypeError, problem_headers, problem_of
from mii_serve.gateway.generation import check_budget, to_base64, to_json
from mii_serve.gateway.json_body import JsonObject, WholeNumber, json_value, read_raw, shown, validated
from mii_serve.gateway.middleware import Endpoints, HttpCall
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.dropped_text import dropped_headers
from mii_serve.server.model_names import ModelNames
from mii_serve.server.open_inference import EXTENSIONS, SERVER_NAME, OpenInference
from mii_serve.types import GenerationRequest
from mii_serve.types.open_inference import (
    MAX_ELEMENTS,
    MAX_TENSORS,
    MODEL_VERSION,
    PLATFORM,
    READY,
    UNAVAILABLE,
    InferRequest,
    InferResponse,
    ModelDescription,
    Scalar,
    TensorDescription,
)
from mii_serve.types.tensors import (
    BYTES,
    FLOATS,
    MAX_DIMENSIONS,
    Tensor,
    check_datatype,
    check_values,
    num_elements,
    pack,
    unpack,
)

JSON_BYTES = "inference-header-content-length"
RAW_MEDIA_TYPE = "application/octet-stream"
_MEDIA_TYPES = frozenset({"", "application/json", RAW_MEDIA_TYPE})
"""Triton's client names none."""
MODEL_PATHS = ("/v2/models/{model:model_name}/versions/{version}", "/v2/models/{model:model_name}")


class _ModelName(StringConvertor):
    """Of a path: a name may have slashes, but what comes after it in the protocol's paths is no part of it."""

    regex = r"[^/].*(?<!/infer)(?<!/ready)(?<!/config)"


register_url_convertor("model_name", _ModelName())


class InputParameters(JsonObject):
    binary_data_size: WholeNumber | None = None


class InferInput(JsonObject):
    name: str
    datatype: str
    shape: list[WholeNumber]
    parameters: InputParameters | None = None
    data: list[Any] | None = None


class OutputParameters(JsonObject):
    binary_data: bool | None = None


class InferOutput(JsonObject):
    name: str
    parameters: OutputParameters | None = None


class InferBody(JsonObject):
    id: str | None = None
    inputs: list[InferInput]
    outputs: list[InferOutput] | None = None
    parameters: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """The JSON value of a body, and the bytes after it."""

    value: Any
    raw: bytes = field(default=b"", repr=False)


class OpenInferenceDialect:
    """`error` is a text; what else clients read is the status."""

    def refusal(self, error: MiiServeError, request_id: str) -> Response:
        problem = problem_of(error, failed=500, late=504)
        return JSONResponse({"error": problem.message}, problem.status, problem_headers(problem))

    def last_event(self, error: MiiServeError, request_id: str) -> bytes:
        raise AssertionError("no answer of this protocol is a stream")


class OpenInferenceRoutes:
    """The answers below `/v2`."""

    def __init__(self, dispatcher: Dispatcher, settings: HttpConfig, names: ModelNames) -> None:
        self._dispatcher = dispatcher
        self._settings = settings
        self._inference = OpenInference(dispatcher, names)

    def routes(self, endpoints: Endpoints) -> list[Route]:
        dialect = OpenInferenceDialect()
        of_a_model = {"/ready": self._model_ready, "/config": self._config, "": self._metadata}
        return [
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            endpoints.route("/v2", self._server, dialect, method="GET", is_work=False),
            endpoints.route("/v2/repository/index", self._index, dialect, is_work=False, read=self._read_index),
            *(endpoints.route(f"{path}/infer", self._infer, dialect, read=self._read) for path in MODEL_PATHS),
            *(
                endpoints.route(f"{path}{end}", answer, dialect, method="GET", is_work=False)
                for end, answer in of_a_model.items()
                for path in MODEL_PATHS
            ),
        ]

    async def _live(self, request: Request) -> Response:
        return PlainTextResponse("")

    async def _ready(self, request: Request) -> Response:
        return PlainTextResponse("", 200 if self._inference.is_ready else 503)

    async def _server(self, call: HttpCall) -> Response:
        return JSONResponse({"name": SERVER_NAME, "version": __version__, "extensions": list(EXTENSIONS)})

    async def _index(self, call: HttpCall) -> Response:
        state = READY if self._inference.is_ready else UNAVAILABLE
        names = await self._inference.names()
        return JSONResponse([{"name": name, "version": MODEL_VERSION, "state": state} for name in names])

    async def _model_ready(self, call: HttpCall) -> Response:
        name = await self._inference.model(*_model(call))
        if not self._inference.is_ready:
            raise UnavailableError(f"{name} is not ready")
        return JSONResponse({"name": name, "ready": True})

    async def _metadata(self, call: HttpCall) -> Response:
        model = await self._inference.describe(*_model(call))
        return JSONResponse(
            {
                "name": model.name,
                "versions": [MODEL_VERSION],
                "platform": PLATFORM,
                "inputs": [_metadata(one) for one in model.inputs],
                "outputs": [_metadata(one) for one in model.outputs],
            }
        )

    async def _config(self, call: HttpCall) -> Response:
        return JSONResponse(_config(await self._inference.describe(*_model(call))))

    async def _read_index(self, request: Request) -> Any:
        """Clients send nothing, or an object that is of no use with one model."""
        raw = await read_raw(request, self._settings.max_body_bytes)
        return json_value(raw) if raw else None

    async def _read(self, request: Request) -> Body:
        media_type = request.headers.get("content-type", "")
        if media_type.partition(";")[0].strip().lower() not in _MEDIA_TYPES:
            raise MediaTypeError("content-type", f"must be application/json or {RAW_MEDIA_TYPE}", shown(media_type))
        raw = await read_raw(request, self._settings.max_body_bytes)
        given = request.headers.get(JSON_BYTES)
        if given is None:
            return Body(value=json_value(raw))
        if not (given.isascii() and given.isdigit() and len(given) < 12 and int(given) <= len(raw)):
            rule = f"must be the bytes of JSON, of the {len(raw)} that the body has"
            raise InvalidRequestError("Inference-Header-Content-Length", rule, shown(given))
        return Body(value=json_value(raw[: int(given)]), raw=raw[int(given) :])

    async def _infer(self, call: HttpCall) -> Response:
        body: Body = call.body
        asked, is_raw = parse(body, *_model(call))
        response, answers = await self._inference.infer(asked, call.context, self._check_budget)
        headers = dropped_headers([answer.parameters for answer in answers])
        headers |= self._dispatcher.provenance_headers(answers[0].images[0])
        json, raw = await asyncio.to_thread(encode, response, is_raw)
        if not raw:
            return Response(json, 200, headers, "application/json")
        headers["Inference-Header-Content-Length"] = str(len(json))
        return Response(b"".join((json, *raw)), 200, headers, RAW_MEDIA_TYPE)

    def _check_budget(self, requests: Sequence[GenerationRequest]) -> None:
        check_budget(self._settings, requests, self._dispatcher.capabilities.defaults.num_inference_steps)


def _model(call: HttpCall) -> tuple[str, str]:
    """The name and the version that a path has."""
    path = call.request.path_params
    return path["model"], path.get("version", "")


# ---- reading -----------------------------------------------------------------------------------------------------


def parse(body: Body, model_name: str, model_version: str) -> tuple[InferRequest, Mapping[str | None, bool]]:
    """What a body asks for, and for each output that it names whether its elements go after the JSON; None is any other.

    Raises:
        InvalidRequestError: naming the member, the tensor or the parameter.
    """
    value = validated(InferBody, body.value)
    outputs = value.outputs or []
    for name, given in (("inputs", value.inputs), ("outputs", outputs), ("parameters", value.parameters or {})):
        if len(given) > MAX_TENSORS:
            raise InvalidRequestError(name, f"must be at most {MAX_TENSORS}", str(len(given)))
    parameters = {name: _scalar(f"parameters.{shown(name)[1:-1]}", one) for name, one in (value.parameters or {}).items()}
    is_usually_raw = parameters.pop("binary_data_output", False)
    if not isinstance(is_usually_raw, bool):
        raise InvalidRequestError("parameters.binary_data_output", "must be true or false", shown(is_usually_raw))
    asked = InferRequest(
        model_name=model_name,
        model_version=model_version,
        id=value.id or "",
        parameters=parameters,
        inputs=_tensors(value.inputs, body.raw),
        outputs=tuple(output.name for output in outputs),
    )
    is_raw: dict[str | None, bool] = {None: is_usually_raw}
    for output in outputs:
        if output.parameters is not None and output.parameters.binary_data is not None:
            is_raw[output.name] = output.parameters.binary_data
    return asked, is_raw


def _tensors(inputs: Sequence[InferInput], raw: bytes) -> tuple[Tensor, ...]:
    tensors, at = list[Tensor](), 0
    for one in inputs:
        path = f"inputs.{shown(one.name)[1:-1]}"
        datatype = check_datatype(path, one.datatype)
        shape = tuple(one.shape)
        count = num_elements(path, shape, MAX_ELEMENTS)
        size = None if one.parameters is None else one.parameters.binary_data_size
        if size is None:
            if one.data is None:
                raise InvalidRequestError(f"{path}.data", "is missing, and so is parameters.binary_data_size")
            values = check_values(f"{path}.data", datatype, count, _flat(f"{path}.data", datatype, one.data))
        else:
            if one.data is not None:
                raise InvalidRequestError(f"{path}.data", "must be left out, because there is a binary_data_size")
            if not 0 <= size <= len(raw) - at:
                rule = f"must be in the {len(raw) - at} bytes that are left after the JSON"
                raise InvalidRequestError(f"{path}.parameters.binary_data_size", rule, str(size))
            values = unpack(path, datatype, count, raw[at : at + size])
            at += size
        tensors.append(Tensor(name=one.name, datatype=datatype, shape=shape, values=values))
    if at < len(raw):
        raise InvalidRequestError("body", "must have no bytes after its last tensor", f"{len(raw) - at} more")
    return tuple(tensors)


def _flat(path: str, datatype: str, values: Sequence[Any], depth: int = 1) -> list[Any]:
    """The elements of arrays in arrays, in order; of too many, as many as show that."""
    if depth > MAX_DIMENSIONS:
        raise InvalidRequestError(path, f"must be nested at most {MAX_DIMENSIONS} deep")
    flat = list[Any]()
    for value in values:
        if len(flat) > MAX_ELEMENTS:
            break
        if isinstance(value, list):
            flat += _flat(path, datatype, value, depth + 1)
        else:
            flat.append(_scalar(path, value, is_float=datatype in FLOATS))
    return flat


def _scalar(path: str, value: Any, *, is_float: bool = False) -> Scalar:
    """JSON has one kind of number: 4.0 is the whole number 4."""
    if isinstance(value, float) and not is_float and value.is_integer():
        return int(value)
    if not isinstance(value, str | bool | int | float):
        raise InvalidRequestError(path, "must be text, a number, true or false", shown(value))
    return value


# ---- answers -----------------------------------------------------------------------------------------------------


def encode(response: InferResponse, is_raw: Mapping[str | None, bool]) -> tuple[bytes, list[bytes]]:
    """The JSON of an answer, and the raw elements that come after it."""
    outputs, raws = list[dict[str, Any]](), list[bytes]()
    for tensor in response.outputs:
        member: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if is_raw.get(tensor.name, is_raw[None]):
            raws.append(pack(tensor))
            member["parameters"] = {"binary_data_size": len(raws[-1])}
        else:
            member["data"] = [to_base64(one) if isinstance(one, bytes) else one for one in tensor.values]
        outputs.append(member)
    head = {
        "model_name": response.model_name,
        "model_version": MODEL_VERSION,
        **({"id": response.id} if response.id else {}),
        "parameters": response.parameters,
    }
    return to_json({**head, "outputs": outputs}), raws


def _metadata(tensor: TensorDescription) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": [-1]}


def _config(model: ModelDescription) -> dict[str, Any]:
    """What Triton's own tools read beside the metadata: that there is no batch dimension, and which inputs may be left out."""

    def tensor(one: TensorDescription) -> dict[str, Any]:
        kind = "STRING" if one.datatype == BYTES else one.datatype
        return {"name": one.name, "data_type": f"TYPE_{kind}", "dims": [-1]}

    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": 0,
        "input": [{**tensor(one), "optional": one.is_optional} for one in model.inputs],
        "output": [tensor(one) for one in model.outputs],
    }

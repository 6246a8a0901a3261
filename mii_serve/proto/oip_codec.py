"""The Open Inference Protocol's messages ⇄ our values. Tensors are read as raw and as typed contents, and written as raw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mii_serve.errors import InvalidRequestError
from mii_serve.proto.codec import MAX_NAMED_FIELDS, unknown_field_numbers
from mii_serve.proto.oip import inference_pb2 as oip
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
    Element,
    Tensor,
    check_datatype,
    check_values,
    num_elements,
    pack,
    shortest_decimal,
    unpack,
)

_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}
"""The field that has the elements of a datatype; FP16 has none."""

_CONFIG_TYPES = {
    **dict(zip(("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"), range(1, 10), strict=True)),
    **dict(zip(("FP16", "FP32", "FP64", BYTES), range(10, 14), strict=True)),
}
"""Numbers of the enumeration `inference.DataType`."""


# ---- requests ----------------------------------------------------------------------------------------------------


def parse_infer_request(wire: bytes) -> InferRequest:
    """Read a `ModelInferRequest`.

    Raises:
        DecodeError: these bytes are no message.
        InvalidRequestError: naming the tensor or parameter, and the rule.
    """
    message = oip.ModelInferRequest.FromString(wire)
    for name in ("inputs", "outputs", "parameters"):
        if (count := len(getattr(message, name))) > MAX_TENSORS:
            raise InvalidRequestError(name, f"must be at most {MAX_TENSORS}", str(count))
    if unknown := unknown_field_numbers(message, *message.inputs, *message.outputs):
        named = f"field numbers {unknown[:MAX_NAMED_FIELDS]}"
        raise InvalidRequestError("request", "has fields this server does not know", named)
    num_raw = len(message.raw_input_contents)
    if num_raw and num_raw != len(message.inputs):
        got = f"{num_raw} for {len(message.inputs)}"
        raise InvalidRequestError("raw_input_contents", "must be none, or one for each of the inputs", got)
    for output in message.outputs:
        _refuse_parameters(f"outputs.{_name(output.name)}", output.parameters)
    raws: Sequence[bytes | None] = message.raw_input_contents if num_raw else [None] * len(message.inputs)
    return InferRequest(
        model_name=message.model_name,
        model_version=message.model_version,
        id=message.id,
        parameters={name: _scalar(f"parameters.{_name(name)}", value) for name, value in message.parameters.items()},
        inputs=tuple(_tensor(tensor, raw) for tensor, raw in zip(message.inputs, raws, strict=True)),
        outputs=tuple(output.name for output in message.outputs),
    )


def parse_model_reference(wire: bytes) -> tuple[str, str]:
    """The name and the version that a request about a model has.

    Raises:
        DecodeError: these bytes are no message.
    """
    message = oip.ModelReference.FromString(wire)
    return message.name, message.version


def _tensor(message: oip.InferInputTensor, raw: bytes | None) -> Tensor:
    path = f"inputs.{_name(message.name)}"
    _refuse_parameters(path, message.parameters)
    datatype = check_datatype(path, message.datatype)
    if len(message.shape) > MAX_ELEMENTS:  # not copied
        raise InvalidRequestError(f"{path}.shape", f"must have at most {MAX_ELEMENTS} dimensions", str(len(message.shape)))
    shape = tuple(message.shape)
    count = num_elements(path, shape, MAX_ELEMENTS)
    if raw is None:
        values = _typed(path, datatype, count, message.contents)
    elif message.HasField("contents"):
        raise InvalidRequestError(f"{path}.contents", "must be left out, because there are raw_input_contents")
    else:
        values = unpack(path, datatype, count, raw)
    return Tensor(name=message.name, datatype=datatype, shape=shape, values=values)


def _typed(path: str, datatype: str, count: int, contents: oip.InferTensorContents) -> Sequence[Element]:
    path = f"{path}.contents"
    given = [one.name for one, _ in contents.ListFields()]
    wanted = _CONTENTS.get(datatype)
    if wanted is None:
        raise InvalidRequestError(path, f"must be raw_input_contents where the datatype is {datatype}")
    if given not in ([], [wanted]):
        raise InvalidRequestError(path, f"must be {wanted} where the datatype is {datatype}", ", ".join(given))
    values = getattr(contents, wanted)
    if len(values) != count:
        raise InvalidRequestError(path, f"must have the {count} elements of its shape", str(len(values)))
    checked = check_values(path, datatype, count, values)
    return [shortest_decimal(float(value)) for value in checked] if datatype == "FP32" else checked


def _refuse_parameters(path: str, parameters: Mapping[str, oip.InferParameter]) -> None:
    """Those of a tensor: shared memory, which is not ours to open, and classification."""
    for name in parameters:
        raise InvalidRequestError(f"{path}.parameters.{_name(name)}", "is not supported")


def _scalar(path: str, value: oip.InferParameter) -> Scalar:
    kind = value.WhichOneof("parameter_choice")
    if kind is None:
        raise InvalidRequestError(path, "must have a value")
    scalar: Scalar = getattr(value, kind)
    return scalar


def _name(name: str) -> str:
    """As errors have it: short and plain, because an error's text is metadata."""
    return name[:60].encode("ascii", "backslashreplace").decode()


# ---- answers -----------------------------------------------------------------------------------------------------


def encode_infer_response(response: InferResponse) -> bytes:
    """A `ModelInferResponse` with raw contents, in the order of the outputs."""
    message = oip.ModelInferResponse(
        model_name=response.model_name,
        model_version=MODEL_VERSION,
        id=response.id,
        outputs=[oip.InferOutputTensor(name=one.name, datatype=one.datatype, shape=one.shape) for one in response.outputs],
        raw_output_contents=[pack(one) for one in response.outputs],
    )
    for name, value in response.parameters.items():
        setattr(message.parameters[name], _choice(value), value)
    return message.SerializeToString()


def _choice(value: Scalar) -> str:
    if isinstance(value, bool):
        return "bool_param"
    if isinstance(value, int):
        return "int64_param" if value < 2**63 else "uint64_param"
    return "string_param" if isinstance(value, str) else "double_param"


def encode_live() -> bytes:
    return oip.ServerLiveResponse(live=True).SerializeToString()


def encode_ready(is_ready: bool) -> bytes:
    """Of the server and of a model: the message is the same."""
    return oip.ServerReadyResponse(ready=is_ready).SerializeToString()


def encode_server(name: str, version: str, extensions: Sequence[str]) -> bytes:
    return oip.ServerMetadataResponse(name=name, version=version, extensions=extensions).SerializeToString()


def encode_metadata(model: ModelDescription) -> bytes:
    return oip.ModelMetadataResponse(
        name=model.name,
        versions=[MODEL_VERSION],
        platform=PLATFORM,
        inputs=[_metadata(tensor) for tensor in model.inputs],
        outputs=[_metadata(tensor) for tensor in model.outputs],
    ).SerializeToString()


def encode_config(model: ModelDescription) -> bytes:
    """What Triton's own tools read beside the metadata: that there is no batch dimension, and which inputs may be left out."""
    config = oip.ModelConfig(
        name=model.name,
        platform=PLATFORM,
        backend=PLATFORM,
        max_batch_size=0,
        input=[
            oip.ModelInput(name=one.name, data_type=_CONFIG_TYPES[one.datatype], dims=[-1], optional=one.is_optional)
            for one in model.inputs
        ],
        output=[oip.ModelOutput(name=one.name, data_type=_CONFIG_TYPES[one.datatype], dims=[-1]) for one in model.outputs],
    )
    return oip.ModelConfigResponse(config=config).SerializeToString()


def encode_index(names: Sequence[str], is_ready: bool) -> bytes:
    state = READY if is_ready else UNAVAILABLE
    models = [oip.ModelIndex(name=name, version=MODEL_VERSION, state=state) for name in names]
    return oip.RepositoryIndexResponse(models=models).SerializeToString()


def _metadata(tensor: TensorDescription) -> oip.TensorMetadata:
    return oip.TensorMetadata(name=tensor.name, datatype=tensor.datatype, shape=[-1])

"""Sends requests over DeepSpeed-MII's own wire: `legacymodelresponse.ModelResponse/Txt2ImgReply`.

The message classes are built here, in a descriptor pool of their own: one process cannot register two files that define the
same messages, and MII's may be loaded. MII's wire has no seed; only the pictures of a server that takes `seed` among the
`query_kwargs` can be checked.
"""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from mii_serve.bench.grpc_driver import code_of, open_channel
from mii_serve.bench.values import BAD_ANSWER, OK, PARAMETER_TYPES, Answer, PlannedRequest, ReceivedPicture
from mii_serve.client.calls import Pairs

METHOD = "/legacymodelresponse.ModelResponse/Txt2ImgReply"

_PACKAGE = "mii_serve.bench.mii"
_FIELD = descriptor_pb2.FieldDescriptorProto
_TYPES = {
    "string": _FIELD.TYPE_STRING,
    "int64": _FIELD.TYPE_INT64,
    "float": _FIELD.TYPE_FLOAT,
    "bool": _FIELD.TYPE_BOOL,
    "bytes": _FIELD.TYPE_BYTES,
}
_KWARGS = tuple(name for name in PARAMETER_TYPES if name not in ("prompt", "negative_prompt"))
_KWARG_FIELDS = {int: "ivalue", float: "fvalue", str: "svalue"}
"""The field of MII's `Value` message for each type."""


def _messages() -> tuple[Any, Any]:
    """The classes of `Text2ImageRequest` and `ImageReply`."""
    file = descriptor_pb2.FileDescriptorProto(name="mii_serve_bench_mii.proto", package=_PACKAGE, syntax="proto3")
    value = file.message_type.add(name="Value")
    value.oneof_decl.add(name="oneof_values")
    for number, (name, kind) in enumerate(
        (("svalue", "string"), ("ivalue", "int64"), ("fvalue", "float"), ("bvalue", "bool")), 1
    ):
        value.field.add(name=name, number=number, type=_TYPES[kind], label=_FIELD.LABEL_OPTIONAL, oneof_index=0)
    request = file.message_type.add(name="Text2ImageRequest")
    for number, name in ((1, "prompt"), (2, "negative_prompt")):
        request.field.add(name=name, number=number, type=_FIELD.TYPE_STRING, label=_FIELD.LABEL_REPEATED)
    entry = request.nested_type.add(name="QueryKwargsEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=_FIELD.TYPE_STRING, label=_FIELD.LABEL_OPTIONAL)
    entry.field.add(
        name="value", number=2, type=_FIELD.TYPE_MESSAGE, label=_FIELD.LABEL_OPTIONAL, type_name=f".{_PACKAGE}.Value"
    )
    request.field.add(
        name="query_kwargs",
        number=3,
        type=_FIELD.TYPE_MESSAGE,
        label=_FIELD.LABEL_REPEATED,
        type_name=f".{_PACKAGE}.Text2ImageRequest.QueryKwargsEntry",
    )
    reply = file.message_type.add(name="ImageReply")
    for number, (name, kind, label) in enumerate(
        (
            ("images", "bytes", _FIELD.LABEL_REPEATED),
            ("nsfw_content_detected", "bool", _FIELD.LABEL_REPEATED),
            ("mode", "string", _FIELD.LABEL_OPTIONAL),
            ("size_w", "int64", _FIELD.LABEL_OPTIONAL),
            ("size_h", "int64", _FIELD.LABEL_OPTIONAL),
            ("time_taken", "float", _FIELD.LABEL_OPTIONAL),
        ),
        1,
    ):
        reply.field.add(name=name, number=number, type=_TYPES[kind], label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = (pool.FindMessageTypeByName(f"{_PACKAGE}.{name}") for name in ("Text2ImageRequest", "ImageReply"))
    first, second = (message_factory.GetMessageClass(descriptor) for descriptor in found)
    return first, second


Text2ImageRequest, ImageReply = _messages()


class MiiDriver:
    """Implements `load.Driver`."""

    def __init__(self, target: str, *, credentials: grpc.ChannelCredentials | None = None, metadata: Pairs = ()) -> None:
        self._metadata = metadata
        self._channel = open_channel(target, credentials)
        self._call: Any = self._channel.unary_unary(
            METHOD, request_serializer=Text2ImageRequest.SerializeToString, response_deserializer=ImageReply.FromString
        )

    async def ask(self, request: PlannedRequest, timeout_s: float) -> Answer:
        try:
            reply = await self._call(encoded(request), timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            return Answer(code=code_of(error), text=error.details() or "")
        if reply.mode != "RGB":
            return Answer(code=BAD_ANSWER, text=f"pictures in mode {reply.mode!r}")
        size = (reply.size_w, reply.size_h)
        return Answer(code=OK, pictures=tuple(ReceivedPicture(encoded=image, raw_size=size) for image in reply.images))

    async def close(self) -> None:
        await self._channel.close()


def encoded(request: PlannedRequest) -> Any:
    """The message that MII's own client would send, with the seed added."""
    asked = request.asked
    message = Text2ImageRequest(prompt=[asked.prompt], negative_prompt=[asked.negative_prompt or ""])
    for name in _KWARGS:
        value = getattr(asked, name)
        if value is None:
            continue
        setattr(message.query_kwargs[name], _KWARG_FIELDS[type(value)], value)
    return message

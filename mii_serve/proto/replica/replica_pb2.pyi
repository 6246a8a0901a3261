from mii_serve.proto.v1 import image_generation_pb2 as _image_generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Order(_message.Message):
    __slots__ = ("generate", "cancel")
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    generate: Generate
    cancel: Cancel
    def __init__(self, generate: _Optional[_Union[Generate, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ...) -> None: ...

class Generate(_message.Message):
    __slots__ = ("id", "request", "request_id", "client", "timeout_s", "traceparent", "input_image", "lora_choice", "has_steps")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    INPUT_IMAGE_FIELD_NUMBER: _ClassVar[int]
    LORA_CHOICE_FIELD_NUMBER: _ClassVar[int]
    HAS_STEPS_FIELD_NUMBER: _ClassVar[int]
    id: int
    request: _image_generation_pb2.GenerateRequest
    request_id: str
    client: str
    timeout_s: float
    traceparent: str
    input_image: InputImage
    lora_choice: LoraChoice
    has_steps: bool
    def __init__(self, id: _Optional[int] = ..., request: _Optional[_Union[_image_generation_pb2.GenerateRequest, _Mapping]] = ..., request_id: _Optional[str] = ..., client: _Optional[str] = ..., timeout_s: _Optional[float] = ..., traceparent: _Optional[str] = ..., input_image: _Optional[_Union[InputImage, _Mapping]] = ..., lora_choice: _Optional[_Union[LoraChoice, _Mapping]] = ..., has_steps: _Optional[bool] = ...) -> None: ...

class InputImage(_message.Message):
    __slots__ = ("rgb", "mask")
    RGB_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    rgb: bytes
    mask: bytes
    def __init__(self, rgb: _Optional[bytes] = ..., mask: _Optional[bytes] = ...) -> None: ...

class LoraChoice(_message.Message):
    __slots__ = ("revisions", "scales", "shares_calls")
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    SHARES_CALLS_FIELD_NUMBER: _ClassVar[int]
    revisions: _containers.RepeatedScalarFieldContainer[str]
    scales: _containers.RepeatedScalarFieldContainer[float]
    shares_calls: bool
    def __init__(self, revisions: _Optional[_Iterable[str]] = ..., scales: _Optional[_Iterable[float]] = ..., shares_calls: _Optional[bool] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: int
    def __init__(self, id: _Optional[int] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("before_steps", "steps", "after_steps")
    BEFORE_STEPS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    AFTER_STEPS_FIELD_NUMBER: _ClassVar[int]
    before_steps: _containers.RepeatedCompositeFieldContainer[News]
    steps: Steps
    after_steps: _containers.RepeatedCompositeFieldContainer[News]
    def __init__(self, before_steps: _Optional[_Iterable[_Union[News, _Mapping]]] = ..., steps: _Optional[_Union[Steps, _Mapping]] = ..., after_steps: _Optional[_Iterable[_Union[News, _Mapping]]] = ...) -> None: ...

class Steps(_message.Message):
    __slots__ = ("id", "image_index", "step", "num_steps", "estimated_left_s")
    ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_LEFT_S_FIELD_NUMBER: _ClassVar[int]
    id: _containers.RepeatedScalarFieldContainer[int]
    image_index: _containers.RepeatedScalarFieldContainer[int]
    step: _containers.RepeatedScalarFieldContainer[int]
    num_steps: _containers.RepeatedScalarFieldContainer[int]
    estimated_left_s: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, id: _Optional[_Iterable[int]] = ..., image_index: _Optional[_Iterable[int]] = ..., step: _Optional[_Iterable[int]] = ..., num_steps: _Optional[_Iterable[int]] = ..., estimated_left_s: _Optional[_Iterable[float]] = ...) -> None: ...

class News(_message.Message):
    __slots__ = ("id", "event", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    event: _image_generation_pb2.GenerateEvent
    error: bytes
    def __init__(self, id: _Optional[int] = ..., event: _Optional[_Union[_image_generation_pb2.GenerateEvent, _Mapping]] = ..., error: _Optional[bytes] = ...) -> None: ...

class LoadLoraRequest(_message.Message):
    __slots__ = ("name", "path")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ...) -> None: ...

class LoraAnswer(_message.Message):
    __slots__ = ("lora", "error")
    LORA_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    lora: _image_generation_pb2.GetServerInfoResponse.Lora
    error: bytes
    def __init__(self, lora: _Optional[_Union[_image_generation_pb2.GetServerInfoResponse.Lora, _Mapping]] = ..., error: _Optional[bytes] = ...) -> None: ...

class RemoveLoraRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RemoveLoraAnswer(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetMetricsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Metrics(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: bytes
    def __init__(self, text: _Optional[bytes] = ...) -> None: ...

from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Value(_message.Message):
    __slots__ = ("svalue", "ivalue", "fvalue", "bvalue")
    SVALUE_FIELD_NUMBER: _ClassVar[int]
    IVALUE_FIELD_NUMBER: _ClassVar[int]
    FVALUE_FIELD_NUMBER: _ClassVar[int]
    BVALUE_FIELD_NUMBER: _ClassVar[int]
    svalue: str
    ivalue: int
    fvalue: float
    bvalue: bool
    def __init__(self, svalue: _Optional[str] = ..., ivalue: _Optional[int] = ..., fvalue: _Optional[float] = ..., bvalue: _Optional[bool] = ...) -> None: ...

class PictureRequest(_message.Message):
    __slots__ = ("prompt", "second", "query_kwargs")
    class QueryKwargsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SECOND_FIELD_NUMBER: _ClassVar[int]
    QUERY_KWARGS_FIELD_NUMBER: _ClassVar[int]
    prompt: _containers.RepeatedScalarFieldContainer[str]
    second: _containers.RepeatedScalarFieldContainer[bytes]
    query_kwargs: _containers.MessageMap[str, Value]
    def __init__(self, prompt: _Optional[_Iterable[str]] = ..., second: _Optional[_Iterable[bytes]] = ..., query_kwargs: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class KwargEntry(_message.Message):
    __slots__ = ("key", "value")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: Value
    def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...

class ImageReply(_message.Message):
    __slots__ = ("images", "nsfw_content_detected", "mode", "size_w", "size_h", "time_taken")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    NSFW_CONTENT_DETECTED_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    SIZE_W_FIELD_NUMBER: _ClassVar[int]
    SIZE_H_FIELD_NUMBER: _ClassVar[int]
    TIME_TAKEN_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedScalarFieldContainer[bytes]
    nsfw_content_detected: _containers.RepeatedScalarFieldContainer[bool]
    mode: str
    size_w: int
    size_h: int
    time_taken: float
    def __init__(self, images: _Optional[_Iterable[bytes]] = ..., nsfw_content_detected: _Optional[_Iterable[bool]] = ..., mode: _Optional[str] = ..., size_w: _Optional[int] = ..., size_h: _Optional[int] = ..., time_taken: _Optional[float] = ...) -> None: ...

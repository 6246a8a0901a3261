"""Tensors of the Open Inference Protocol: their datatypes, the rules for their shapes, and their elements as raw bytes.

Only what parameters of a request need: one dimension that is not 1, and few elements. https://github.com/kserve/open-inference-protocol
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from mii_serve.errors import InvalidRequestError

Element: TypeAlias = bytes | str | bool | int | float

BYTES = "BYTES"
"""Of elements that have each a length of their own: texts and images."""
MAX_DIMENSIONS = 8
_MAX_SHOWN_CHARS = 60

_CODES = {
    **{"BOOL": "?", "FP16": "e", "FP32": "f", "FP64": "d"},
    **{"INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q"},
    **{"UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q"},
}
"""Of the module `struct`, which packs as the protocol does: little-endian, one after the other."""
FLOATS = ("FP16", "FP32", "FP64")
INTEGERS = tuple(name for name in _CODES if "INT" in name)
DATATYPES = (BYTES, *_CODES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """`values` are the elements, in row-major order; as many as the `shape` says."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[Element] = field(repr=False)


def check_datatype(path: str, datatype: str) -> str:
    """The datatype, if it is one.

    Raises:
        InvalidRequestError: naming the path of the tensor's datatype.
    """
    if datatype not in DATATYPES:
        raise InvalidRequestError(f"{path}.datatype", f"must be one of {', '.join(DATATYPES)}", _shown(datatype))
    return datatype


def num_elements(path: str, shape: Sequence[int], most: int) -> int:
    """How many elements a tensor of this shape has.

    Raises:
        InvalidRequestError: naming the path of the tensor's shape, where it is none for up to `most` elements in a row.
    """
    path = f"{path}.shape"
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidRequestError(path, f"must have at most {MAX_DIMENSIONS} dimensions", str(len(shape)))
    if any(size < 1 for size in shape):
        raise InvalidRequestError(path, "must have dimensions of 1 or more", _shown(list(shape)))
    sizes = [size for size in shape if size != 1]
    if len(sizes) > 1:
        raise InvalidRequestError(path, "must have one dimension at most that is not 1", _shown(list(shape)))
    count = sizes[0] if sizes else 1
    if count > most:
        raise InvalidRequestError(path, f"must be of at most {most} elements", str(count))
    return count


def check_values(path: str, datatype: str, count: int, values: Sequence[object]) -> tuple[Element, ...]:
    """The elements of a tensor, as many as there must be and each of the datatype. A whole number is a float, too.

    Raises:
        InvalidRequestError: naming the path of the tensor or of its element.
    """
    if len(values) != count:
        raise InvalidRequestError(path, f"must have the {count} elements of its shape", str(len(values)))
    return tuple(_checked(f"{path}[{i}]", datatype, value) for i, value in enumerate(values))


def unpack(path: str, datatype: str, count: int, raw: bytes) -> tuple[Element, ...]:
    """The elements of a tensor from its raw bytes.

    Raises:
        InvalidRequestError: naming the tensor, where it does not have as many bytes as it must.
    """
    if datatype == BYTES:
        return tuple(_split(path, count, raw))
    code = _CODES[datatype]
    if len(raw) != (wanted := count * struct.calcsize(code)):
        raise InvalidRequestError(path, f"must have {wanted} bytes, {count} elements of {datatype}", str(len(raw)))
    values = struct.unpack(f"<{count}{code}", raw)
    return tuple(shortest_decimal(value, code) for value in values) if datatype in ("FP16", "FP32") else values


def pack(tensor: Tensor) -> bytes:
    """The elements as raw bytes; texts are UTF-8."""
    if tensor.datatype == BYTES:
        pieces = list[bytes]()
        for value in tensor.values:
            piece = value.encode() if isinstance(value, str) else value
            assert isinstance(piece, bytes)
            pieces += (struct.pack("<I", len(piece)), piece)
        return b"".join(pieces)
    return struct.pack(f"<{len(tensor.values)}{_CODES[tensor.datatype]}", *tensor.values)


def shortest_decimal(value: float, code: str = "f") -> float:
    """The decimal number with the fewest digits that has this value in 32 bits, or in the bits of another `code` of `struct`.

    That is what a caller wrote whose 7.3 arrives as 7.300000190734863.
    """
    try:
        wire = struct.pack(f"<{code}", value)
        for digits in range(1, 10):
            candidate = float(f"{value:.{digits}g}")
            if struct.pack(f"<{code}", candidate) == wire:
                return candidate
    except OverflowError:  # beside the largest 32-bit number, or not a 32-bit number at all
        pass
    return value


def _split(path: str, count: int, raw: bytes) -> Iterable[bytes]:
    rule = f"must have {count} elements, each a length of 4 bytes and so many bytes"
    at = 0
    for i in range(count):
        begin = at + 4
        if begin > len(raw):
            raise InvalidRequestError(path, rule, f"the end of the tensor in the length of element {i}")
        at = begin + int.from_bytes(raw[begin - 4 : begin], "little")
        if at > len(raw):
            rest = f"a length of {at - begin} for element {i}, and {len(raw) - begin} bytes"
            raise InvalidRequestError(path, rule, rest)
        yield raw[begin:at]
    if at < len(raw):
        raise InvalidRequestError(path, rule, f"{len(raw) - at} bytes more")


def _checked(path: str, datatype: str, value: object) -> Element:
    if datatype == BYTES:
        if not isinstance(value, bytes | str):
            raise InvalidRequestError(path, "must be text", _shown(value))
        return value
    if datatype == "BOOL":
        if not isinstance(value, bool):
            raise InvalidRequestError(path, "must be true or false", _shown(value))
        return value
    if datatype in FLOATS:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidRequestError(path, "must be a number", _shown(value))
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(path, "must be a whole number", _shown(value))
    try:
        struct.pack(f"<{_CODES[datatype]}", value)
    except struct.error:
        raise InvalidRequestError(path, f"must fit into {datatype}", _shown(value)) from None
    return value


def _shown(value: object) -> str:
    """Fit for an error's text, which is metadata and has a bound."""
    if isinstance(value, list | int | float) and not isinstance(value, bool):
        return str(value)[:_MAX_SHOWN_CHARS]
    return ascii(value[:_MAX_SHOWN_CHARS]) if isinstance(value, str | bytes) else type(value).__name__

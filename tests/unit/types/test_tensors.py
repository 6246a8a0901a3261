"""Tensors: what is packed is what is unpacked, and no length or shape is believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mii_serve.errors import InvalidRequestError
from mii_serve.types.tensors import DATATYPES, INTEGERS, Tensor, check_values, num_elements, pack, shortest_decimal, unpack


def values_of(datatype: str) -> st.SearchStrategy:
    if datatype in INTEGERS:
        bits = int(datatype.strip("UINT"))
        return st.integers(0, 2**bits - 1) if datatype.startswith("U") else st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    width = int(datatype.removeprefix("FP")) if datatype.startswith("FP") else 64
    floats = st.floats(allow_nan=False, allow_infinity=False, width=width)
    return {"BYTES": st.binary(max_size=9), "BOOL": st.booleans()}.get(datatype, floats)


@given(st.data(), st.sampled_from(DATATYPES))
def test_what_is_packed_is_unpacked(data, datatype):
    values = data.draw(st.lists(values_of(datatype), min_size=1, max_size=5))
    raw = pack(Tensor(name="x", datatype=datatype, shape=(len(values),), values=values))
    found = unpack("x", datatype, len(values), raw)
    if datatype in ("FP16", "FP32"):
        values = [shortest_decimal(value, "e" if datatype == "FP16" else "f") for value in values]
    assert list(found) == values == list(check_values("x", datatype, len(values), found))
    for wrong in (raw[:-1], raw + b"\0"):
        with pytest.raises(InvalidRequestError, match=r"^x: must have"):
            unpack("x", datatype, len(values), wrong)


@given(st.lists(st.integers(-3, 70), max_size=10))
def test_a_shape_is_of_so_many_elements_in_a_row_or_refused(shape):
    is_row = len(shape) <= 8 and all(size > 0 for size in shape) and sum(size > 1 for size in shape) <= 1
    count = max(shape, default=1)
    if is_row and count <= 64:
        assert num_elements("x", shape, 64) == count
    else:
        with pytest.raises(InvalidRequestError, match=r"^x\.shape: must"):
            num_elements("x", shape, 64)

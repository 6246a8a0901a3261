"""JSON bodies against their models: what is converted, and that a refusal names one member by its path, and the rule."""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import pytest
from pydantic import Field

from mii_serve.errors import InvalidRequestError
from mii_serve.gateway.json_body import JsonObject, WholeNumber, one_of, shown, validated


class Inner(JsonObject):
    count: WholeNumber | None = None
    scale: float | None = None
    names: list[Annotated[str, one_of(("a", "b"))]] = Field(default_factory=list)


class Outer(JsonObject):
    unsupported: ClassVar = MappingProxyType({"mask": "is not supported"})

    inner: Inner
    text: str = ""
    flag: bool = False


def outer(**inner: Any) -> dict[str, Any]:
    return {"inner": inner}


def test_numbers_are_read_as_json_means_them():
    inner = validated(Outer, outer(count=4.0, scale=7)).inner
    assert (inner.count, type(inner.count), inner.scale) == (4, int, 7.0)
    assert validated(Outer, outer(count=None)).inner.count is None


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ([], "body: must be a JSON object, got an array"),
        (None, "body: must be a JSON object, got null"),
        ({}, "inner: is missing"),
        ({"inner": 1}, "inner: must be a JSON object, got 1"),
        (outer(count="4"), "inner.count: must be a whole number, got '4'"),
        (outer(count=True), "inner.count: must be a whole number, got true"),
        (outer(count=4.5), "inner.count: must be a whole number, got 4.5"),
        (outer(count=2**64), "inner.count: must be at most 18446744073709551615, got 18446744073709551616"),
        (outer(count=-(10**300)), "inner.count: must be at least -9223372036854775808, got -1" + "0" * 58),
        (outer(scale=False), "inner.scale: must be a number, got false"),
        (outer(scale=10**400), "inner.scale: must be a number, got 1" + "0" * 59),
        (outer(names="a"), "inner.names: must be an array, got 'a'"),
        (outer(names=["a", "c"]), "inner.names[1]: must be one of a, b, got 'c'"),
        (outer(names=["a", 2]), "inner.names[1]: must be text, got 2"),
        ({**outer(), "flag": 1}, "flag: must be true or false, got 1"),
        ({**outer(), "text": None}, "text: must be text, got null"),
        ({**outer(), "mask": None}, "mask: is not supported"),
        (outer(scle=1), "inner.scle: is not known here; did you mean scale? known are count, names, scale"),
        (outer(**{"{x}": 1}), "inner.{x}: is not known here; known are count, names, scale"),
        (outer(**{"\ud800": 1}), "inner.\\ud800: is not known here; known are count, names, scale"),
    ],
)
def test_a_refusal_names_the_path_and_the_rule(body, text):
    with pytest.raises(InvalidRequestError) as caught:
        validated(Outer, body)
    assert str(caught.value) == text and caught.value.field == text.partition(":")[0]


def test_what_is_shown_of_a_value_is_short():
    assert len(shown("x" * 10**6)) <= 60 and len(shown(10**400)) <= 60 and shown({"a": 1}) == "an object"

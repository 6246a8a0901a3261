"""AUTOMATIC1111's prompts, text by text."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mii_serve.errors import InvalidRequestError
from mii_serve.types import A1111, BREAK, Capabilities, GenerationDefaults, Limits, RequestedParams, parse_a1111
from mii_serve.types.prompt_syntax import MAX_WEIGHT


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", []),
        ("a cat: red", [("a cat: red", 1)]),
        ("a (red) ball", [("a ", 1), ("red", 1.1), (" ball", 1)]),
        ("a ((red) hot) [cold]", [("a ", 1), ("red", 1.21), (" hot", 1.1), (" ", 1), ("cold", 1 / 1.1)]),
        ("(red: 1.5 )(blue:-.5)", [("red", 1.5), ("blue", -0.5)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1), (" c", 0.5)]),
        (r"\(a\) \[b\] \\ \c", [(r"(a) [b] \ c", 1)]),
        ("a) b] :1.2) c", [("a) b] :1.2) c", 1)]),
        ("(a [b", [("a ", 1.1), ("b", 1)]),
        ("([a)b]c", [("a", 1), ("b", 1 / 1.1), ("c", 1)]),
        ("(a:nan)", [("a:nan", 1.1)]),
        ("a BREAK  (b BREAK c:2)BREAKS", [("a", 1), ("BREAK", 0), ("b", 2), ("BREAK", 0), ("c", 2), ("BREAKS", 1)]),
        ("a (b) c".replace("(b)", "(b:1)"), [("a b c", 1)]),
    ],
)
def test_each_part_has_its_weight(prompt, parts):
    found = [(part.text, pytest.approx(part.weight)) for part in parse_a1111("prompt", prompt) if part.text]
    assert found == parts


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("(a:1.2.3)", "negative_prompt: must have numbers as weights, got '1.2.3'"),
        ("(a:.)", "must have numbers as weights"),
        ("(a:11)", r"negative_prompt: must weigh each part in \[-10, 10\], got 11 for 'a'"),
        (f"(a:{'9' * 400})", "must weigh each part"),
        ("(" * 4095 + "a", "must weigh each part"),
        ("a BREAK " * 8, "must have fewer than 8 BREAKs"),
    ],
)
def test_what_cannot_be_meant_is_refused(prompt, text):
    capabilities = Capabilities(limits=Limits(), defaults=GenerationDefaults(scheduler="a"), schedulers={"a": "a"})
    asked = RequestedParams(prompt="a", negative_prompt=prompt, prompt_syntax=A1111)
    with pytest.raises(InvalidRequestError, match=text):
        capabilities.resolve(asked, fallback_seed=0)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["a", "b ", ",", "BREAK", *"()[]\\:.12-"]), max_size=40).map("".join))
def test_whatever_is_written_has_finite_weights_or_an_error(prompt):
    try:
        parts = parse_a1111("prompt", prompt)
    except InvalidRequestError:
        return
    assert all(math.isfinite(part.weight) and abs(part.weight) <= MAX_WEIGHT for part in parts)
    told = "".join(part.text for part in parts if part is not BREAK)
    assert len(told) <= len(prompt) and set(told) <= set(prompt)

"""What a text encoder had no room for fits into a header, whatever its script and length."""

from __future__ import annotations

from urllib.parse import unquote

from fake_engine import FakeEngine

from mii_serve.server.dropped_text import MAX_HEADER_CHARS, dropped_headers, dropped_texts
from mii_serve.types import EffectiveParameters, RequestedParams

ENGINE = FakeEngine()
PARAMS = ENGINE.capabilities.resolve(RequestedParams(prompt="p"), fallback_seed=0)

SPARE = len("%E2%80%A6")


def done(prompt: str = "", negative: str = "") -> EffectiveParameters:
    scheduler = ENGINE.describe_scheduler(PARAMS)
    return EffectiveParameters.of(
        PARAMS, ENGINE.description, scheduler, dropped_prompt=prompt, dropped_negative_prompt=negative
    )


def test_nothing_is_told_where_nothing_was_dropped():
    assert dropped_headers([done(), done()]) == {} == dropped_texts(done())


def test_texts_of_any_script_come_back_whole():
    text = "красный круг, 赤い円\r\n100 %"
    headers = dropped_headers([done(text, "b")])
    assert unquote(headers["x-mii-dropped-prompt"]) == text and headers["x-mii-dropped-prompt"].isascii()
    assert headers["x-mii-dropped-negative-prompt"] == "b"
    assert dropped_texts(done(text)) == {"dropped_prompt": text}


def test_each_request_has_its_entry():
    headers = dropped_headers([done("a, b"), done(), done("c")])
    assert [unquote(entry) for entry in headers["x-mii-dropped-prompt"].split(",")] == ["a, b", "", "c"]


def test_what_is_too_long_is_cut_between_characters():
    for texts in (["円" * 4000], ["円" * 4000] * 64):
        header = dropped_headers([done(text) for text in texts])["x-mii-dropped-prompt"]
        assert len(header) <= MAX_HEADER_CHARS + len(texts) * (SPARE + 1)
        for entry in header.split(","):
            assert unquote(entry, errors="strict").strip("円") == "…"

"""Text that the text encoder had no room for: as members of an answer or, where it has none, as headers and metadata."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from mii_serve.types import EffectiveParameters

DROPPED = ("dropped_prompt", "dropped_negative_prompt")
MAX_HEADER_CHARS = 1024
"""Many proxies take no more than 4 KiB for all headers of an answer together."""


def dropped_texts(parameters: EffectiveParameters) -> dict[str, str]:
    """By name, what was not used; nothing where all of it was."""
    return {name: text for name in DROPPED if (text := getattr(parameters, name))}


def dropped_headers(answers: Sequence[EffectiveParameters]) -> dict[str, str]:
    """`x-mii-dropped-prompt` and `x-mii-dropped-negative-prompt`, where some text was dropped.

    Percent-encoded UTF-8, an entry for each request, in order; what is too long is cut, and ends in an encoded ellipsis.
    """
    headers = {}
    for name in DROPPED:
        texts = [getattr(parameters, name) for parameters in answers]
        if any(texts):
            room = MAX_HEADER_CHARS // len(texts)
            headers[f"x-mii-{name.replace('_', '-')}"] = ",".join(_percent_encoded(text, room) for text in texts)
    return headers


def _percent_encoded(text: str, room: int) -> str:
    encoded, length = list[str](), 0
    for character in text:
        piece = quote(character, safe="")
        length += len(piece)
        if length > room:
            return "".join(encoded) + quote("\N{HORIZONTAL ELLIPSIS}")
        encoded.append(piece)
    return "".join(encoded)

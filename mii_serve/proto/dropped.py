"""Text that the text encoder had no room for: told as members of an answer, or where it has none, in headers and metadata."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from mii_serve.proto.v1 import image_generation_pb2 as pb

DROPPED = ("dropped_prompt", "dropped_negative_prompt")
MAX_HEADER_CHARS = 1024
"""Many a proxy takes no more than 4 KiB for all headers of an answer together."""


def dropped_texts(done: pb.EffectiveParameters) -> dict[str, str]:
    """By name, what was not used; nothing where all of it was."""
    return {name: text for name in DROPPED if (text := getattr(done, name))}


def dropped_headers(all_done: Sequence[pb.EffectiveParameters]) -> dict[str, str]:
    """`x-mii-dropped-prompt` and `x-mii-dropped-negative-prompt`, where there is something to tell.

    Percent-encoded UTF-8, an entry for each request, in order; what is too long is cut, and ends in an encoded ellipsis.
    """
    headers = {}
    for name in DROPPED:
        texts = [getattr(done, name) for done in all_done]
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

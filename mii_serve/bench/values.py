"""The values of a benchmark: the request that is planned, the answer to it, and the record of both. Standard library and Pillow
only.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import get_args, get_type_hints

from PIL import Image

from mii_serve.types import RequestedParams

PARAMETER_TYPES: dict[str, type[str] | type[int] | type[float]] = {
    name: kind
    for name, hint in get_type_hints(RequestedParams).items()
    if (kind := next((kind for kind in get_args(hint) if kind is not type(None)), hint)) in (str, int, float)
}
"""The type of every parameter of a request that is a text or a number."""

OK = "OK"
DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
NOT_SENT = "NOT_SENT"
"""The deadline passed while `max_in_flight` other requests were in flight; a failure like any other."""
BAD_ANSWER = "BAD_ANSWER"
"""The server reported success, and the answer is not what the request asked for: pictures are missing, unreadable, or of
another size.
"""
UNREACHABLE = "UNREACHABLE"
"""No connection, or one that broke. Not a refusal, which a server makes."""
REFUSALS = frozenset({"RESOURCE_EXHAUSTED", "UNAVAILABLE", "HTTP_429", "HTTP_503"})
"""Codes of a server that has no room now; every other code but OK is a failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request of the load; `asked` has a seed, so that the check can make its pictures again."""

    index: int
    kind: str
    asked: RequestedParams
    preview_every: int | None = None

    @property
    def num_images(self) -> int:
        return self.asked.num_images_per_prompt or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedPicture:
    """A picture as it was received: an image file, or with `raw_size` (width, height; pixels) raw RGB, 3 bytes a pixel."""

    encoded: bytes = field(repr=False)
    raw_size: tuple[int, int] | None = None

    def open(self) -> Image.Image:
        """The picture in RGB.

        Raises:
            ValueError, OSError: it cannot be read.
        """
        if self.raw_size is not None:
            return Image.frombytes("RGB", self.raw_size, self.encoded)
        with Image.open(io.BytesIO(self.encoded)) as file:
            return file.convert("RGB")

    def size(self) -> tuple[int, int]:
        """Width and height; of a file, only its header is read.

        Raises:
            ValueError, OSError: it cannot be read.
        """
        if self.raw_size is not None:
            width, height = self.raw_size
            if len(self.encoded) != 3 * width * height:
                raise ValueError(f"{len(self.encoded)} bytes are not a {width}x{height} RGB picture")
            return self.raw_size
        with Image.open(io.BytesIO(self.encoded)) as file:
            return file.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The outcome of a request, as a driver saw it. Times are seconds of the event loop's clock."""

    code: str
    text: str = field(default="", repr=False)
    pictures: tuple[ReceivedPicture, ...] = field(default=(), repr=False)
    started_at: float | None = None
    first_step_at: float | None = None
    first_preview_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The record of one request. `intended_s`, `sent_s` and `ended_s` are seconds since the load began.

    The durations, in seconds, count from `intended_s`, when the request was meant to start, and not from `sent_s`, when the
    generator sent it: a request that is sent late because the server stalled is late all the same.
    """

    index: int
    kind: str
    num_images: int
    intended_s: float
    sent_s: float
    ended_s: float
    code: str
    queue_s: float | None = None
    first_step_s: float | None = None
    first_preview_s: float | None = None

    @property
    def total_s(self) -> float:
        return self.ended_s - self.intended_s

    @property
    def is_ok(self) -> bool:
        return self.code == OK

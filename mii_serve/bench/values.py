"""The values that travel through a benchmark: what is asked, what came back, and what is kept of it."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

from PIL import Image

from mii_serve.types import RequestedParams

OK = "OK"
DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
NOT_SENT = "NOT_SENT"
"""Its time ran out while `max_in_flight` others kept it from being sent; a failure like any other."""
BAD_ANSWER = "BAD_ANSWER"
"""The server said it went well, and the answer is not what was asked for: pictures missing, unreadable, or of another size."""
UNREACHABLE = "UNREACHABLE"
"""Nobody answered: no connection, or one that broke. Not a refusal, which a server makes."""
REFUSALS = frozenset({"RESOURCE_EXHAUSTED", "UNAVAILABLE", "HTTP_429", "HTTP_503"})
"""Codes of a server that says it has no room now; everything else that is not OK is an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request of the load; `asked` has a seed, so that its picture can be made again elsewhere."""

    index: int
    kind: str
    asked: RequestedParams
    preview_every: int | None = None

    @property
    def num_images(self) -> int:
        return self.asked.num_images_per_prompt or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A picture as it was received: a file, or with `raw_size` (width, height) bare RGB."""

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
                raise ValueError(f"{len(self.encoded)} bytes are no {width}x{height} RGB picture")
            return self.raw_size
        with Image.open(io.BytesIO(self.encoded)) as file:
            return file.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of a request, as a driver saw it. The times are the event loop's clock, in seconds."""

    code: str
    text: str = field(default="", repr=False)
    pictures: tuple[Shown, ...] = field(default=(), repr=False)
    started_at: float | None = None
    first_step_at: float | None = None
    first_preview_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request in the books; times are seconds, points in time since the load began.

    `total_s` counts from `intended_s`, when the request was meant to start, and not from `sent_s`, when the generator came to
    it: a server that stalls is also late for those who had to wait behind the stall. The other durations count from
    `intended_s` too.
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

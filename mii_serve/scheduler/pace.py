"""How fast this machine works, learnt from the turns it makes: seconds per turn of each shape, and work per second."""

from __future__ import annotations

from collections.abc import Iterable

Shape = tuple[int, int]
"""Latent height and width."""

NEWEST_COUNTS = 0.2
"""Share of the newest measurement in the moving averages: ten turns on, nine tenths of what was before is forgotten."""

MAX_SHAPES = 256


class Pace:
    """Moving averages; None wherever nothing was measured."""

    def __init__(self) -> None:
        self._turn_s: dict[Shape, float] = {}
        self._fastest_s: dict[Shape, float] = {}
        self._s_per_work: float | None = None

    def measured(self, shape: Shape, work: int, elapsed_s: float) -> None:
        if not work or elapsed_s <= 0:
            return
        if shape not in self._turn_s and len(self._turn_s) >= MAX_SHAPES:
            oldest = next(iter(self._turn_s))
            del self._turn_s[oldest], self._fastest_s[oldest]
        self._turn_s[shape] = _blend(self._turn_s.get(shape), elapsed_s)
        self._fastest_s[shape] = min(self._fastest_s.get(shape, elapsed_s), elapsed_s)
        self._s_per_work = _blend(self._s_per_work, elapsed_s / work)

    def fastest_s(self, shape: Shape) -> float | None:
        return self._fastest_s.get(shape)

    def interval_s(self, active: Iterable[Shape]) -> float | None:
        """From one step of a sample to its next: a turn of each active shape."""
        known = [self._turn_s[shape] for shape in active if shape in self._turn_s]
        return sum(known) if known else None

    def seconds_for(self, work: int) -> float | None:
        return None if self._s_per_work is None else work * self._s_per_work


def _blend(before: float | None, newest: float) -> float:
    return newest if before is None else before + NEWEST_COUNTS * (newest - before)

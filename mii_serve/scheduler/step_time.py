"""The step time estimate, from the turns that were measured: seconds per turn of each batch key, and seconds per work."""

from __future__ import annotations

from collections.abc import Iterable

from mii_serve.types import BatchKey

NEWEST_WEIGHT = 0.2
"""Of the newest measurement in the moving averages: after ten turns, nine tenths of the earlier value are gone."""

MAX_KEYS = 256
"""Batch keys whose times are kept; the least recently added one is dropped first."""


class StepTimeEstimate:
    """Exponential moving averages, in seconds; None wherever nothing was measured.

    Work is in rows × latent pixels × UNet calls, as `GenerationParams.work_per_call` counts it.
    """

    def __init__(self) -> None:
        self._turn_s: dict[BatchKey, float] = {}
        self._fastest_s: dict[BatchKey, float] = {}
        self._s_per_work: float | None = None

    def add_turn(self, key: BatchKey, work: int, elapsed_s: float) -> None:
        """Take in a turn that did `work` for samples of this key."""
        if not work or elapsed_s <= 0:
            return
        if key not in self._turn_s and len(self._turn_s) >= MAX_KEYS:
            oldest = next(iter(self._turn_s))
            del self._turn_s[oldest], self._fastest_s[oldest]
        self._turn_s[key] = _average(self._turn_s.get(key), elapsed_s)
        self._fastest_s[key] = min(self._fastest_s.get(key, elapsed_s), elapsed_s)
        self._s_per_work = _average(self._s_per_work, elapsed_s / work)

    def fastest_s(self, key: BatchKey) -> float | None:
        """The shortest turn of this key so far."""
        return self._fastest_s.get(key)

    def interval_s(self, active: Iterable[BatchKey]) -> float | None:
        """From one step of a sample to its next: a turn of each active key."""
        known = [self._turn_s[key] for key in active if key in self._turn_s]
        return sum(known) if known else None

    def seconds_for(self, work: int) -> float | None:
        return None if self._s_per_work is None else work * self._s_per_work


def _average(before: float | None, newest: float) -> float:
    return newest if before is None else before + NEWEST_WEIGHT * (newest - before)

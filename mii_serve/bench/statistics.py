"""The arithmetic of the report: percentiles, and how sure one can be of them.

Requests of one run are not independent: a queue that is long now is long a moment later. So intervals come from a block
bootstrap, which draws whole stretches of the run instead of single requests; drawn one by one, they would look far too
certain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

PERCENTS = (50, 90, 95, 99)
CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
ROWS_AT_ONCE = 500_000
"""Bounds the memory of re-drawing."""

Rows = npt.NDArray[np.float64]


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks: of [1, 2, 3, 4] the 50th is 2.5.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values have no percentile")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below, share = math.floor(rank), rank % 1
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + share * (ordered[above] - ordered[below])


def summarize(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles and maximum; None of nothing."""
    if not values:
        return None
    named = {f"p{percent}": percentile(values, percent) for percent in PERCENTS}
    return {"count": len(values), "mean": math.fsum(values) / len(values), **named, "max": max(values)}


def block_length(count: int) -> int:
    """Rows drawn together: the square root of all, long enough for a queue to build up and drain."""
    return max(1, round(math.sqrt(count)))


def resampled(rows: Rows, figures: Callable[[Rows], Rows], *, seed: int, num_resamples: int = NUM_RESAMPLES) -> Rows:
    """The figures of as many re-drawn runs, one run a row: circular blocks of consecutive rows, as many rows as there are.

    `figures` gets runs × rows × columns and answers with runs × figures.
    """
    count = len(rows)
    length = block_length(count)
    num_blocks = -(-count // length)
    chance = np.random.default_rng(seed)
    drawn = []
    at_once = max(1, ROWS_AT_ONCE // count)
    for done in range(0, num_resamples, at_once):
        num_runs = min(at_once, num_resamples - done)
        starts = chance.integers(0, count, (num_runs, num_blocks, 1))
        picked = (starts + np.arange(length)).reshape(num_runs, -1)[:, :count] % count
        drawn.append(figures(rows[picked]))
    return np.concatenate(drawn)


def interval(figures: Rows) -> list[float]:
    """What lies between the outer 2.5 % on each side."""
    outer = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(figures, (outer, 100 - outer))
    return [float(low), float(high)]

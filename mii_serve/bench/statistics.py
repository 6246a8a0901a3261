"""Percentiles and summaries of a list of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

PERCENTS = (50, 90, 95, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolate linearly between the two nearest ranks: the 50th percentile of [1, 2, 3, 4] is 2.5.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values: they have no percentile")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below, share = math.floor(rank), rank % 1
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + share * (ordered[above] - ordered[below])


def summarize(values: Sequence[float]) -> dict[str, float] | None:
    """Count, mean, percentiles and maximum; None if there are no values."""
    if not values:
        return None
    named = {f"p{percent}": percentile(values, percent) for percent in PERCENTS}
    return {"count": len(values), "mean": math.fsum(values) / len(values), **named, "max": max(values)}

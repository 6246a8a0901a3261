"""Confidence intervals of a run's figures, and which differences between two runs exceed chance. Needs numpy.

Requests of one run are not independent: if the queue is long now, it is long a moment later. So the intervals come from a
block bootstrap, which resamples consecutive stretches of a run; resampling single requests would make the intervals far too
narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mii_serve.bench.statistics import PERCENTS
from mii_serve.bench.values import Record

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
"""Runs that are resampled from one; with 2000, the bounds of a 95 % interval rest on the 50 outermost runs of each side."""
MAX_ROWS_AT_ONCE = 500_000
"""Rows that are resampled together; bounds the memory."""
MIN_ROWS = 10
"""Fewer requests give no interval."""
MIN_BEYOND = 2
"""A percentile with fewer requests above it depends on single requests, and gets no interval: the 99th of 100 requests."""

LATENCIES = ("total_mean", *(f"total_p{percent}" for percent in PERCENTS))
RATES = ("requests_per_s", "images_per_s")
GOODPUT = "goodput_per_s"

Rows = npt.NDArray[np.float64]


def block_length(count: int) -> int:
    """Consecutive rows in a block: the square root of all, long enough for a queue to build up and drain."""
    return max(1, round(math.sqrt(count)))


def resampled(rows: Rows, figures: Callable[[Rows], Rows], *, seed: int, num_resamples: int = NUM_RESAMPLES) -> Rows:
    """The figures of `num_resamples` resampled runs, shape (num_resamples, num_figures).

    A resampled run has as many rows as `rows`, in blocks of consecutive ones; a block may wrap around the end. `figures` maps
    an array (runs, rows, columns) to one (runs, num_figures).
    """
    count = len(rows)
    length = block_length(count)
    num_blocks = -(-count // length)
    rng = np.random.default_rng(seed)
    drawn = []
    at_once = max(1, MAX_ROWS_AT_ONCE // count)
    for done in range(0, num_resamples, at_once):
        num_runs = min(at_once, num_resamples - done)
        starts = rng.integers(0, count, (num_runs, num_blocks, 1))
        picked = (starts + np.arange(length)).reshape(num_runs, -1)[:, :count] % count
        drawn.append(figures(rows[picked]))
    return np.concatenate(drawn)


def interval(figures: Rows) -> list[float]:
    """The bounds between which `CONFIDENCE` of the values lie, with as many below as above."""
    outside = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(figures, (outside, 100 - outside))
    return [float(low), float(high)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The figures of the resampled runs by name: shape (NUM_RESAMPLES,)."""

    figures: dict[str, Rows]

    def intervals(self) -> dict[str, list[float]]:
        return {name: interval(values) for name, values in self.figures.items()}


def spread(records: Sequence[Record], *, target_s: float | None, seed: int = 0) -> Spread:
    """Resample a run; figures with too few requests are left out."""
    figures: dict[str, Rows] = {}
    well = sorted((record for record in records if record.is_ok), key=lambda record: record.intended_s)
    if len(well) >= MIN_ROWS:
        drawn = resampled(np.array([[record.total_s] for record in well]), _latencies, seed=seed)
        enough = (True, *(len(well) * (100 - percent) >= 100 * MIN_BEYOND for percent in PERCENTS))
        figures |= {name: values for name, values, is_kept in zip(LATENCIES, drawn.T, enough, strict=True) if is_kept}
    if len(records) >= MIN_ROWS:
        drawn = resampled(_rows_of_rates(records, target_s), _rates, seed=seed)
        names = (*RATES, *((GOODPUT,) if target_s is not None else ()))
        figures |= dict(zip(names, drawn.T, strict=False))
    return Spread(figures=figures)


def _latencies(runs: Rows) -> Rows:
    totals = runs[..., 0]
    return np.concatenate((totals.mean(axis=1)[None], np.percentile(totals, PERCENTS, axis=1))).T


def _rows_of_rates(records: Sequence[Record], target_s: float | None) -> Rows:
    """Rows in the order in which requests ended: seconds since the end before, and the request's share of each count."""
    ended = sorted(records, key=lambda record: record.ended_s)
    rows, before_s = [], 0.0
    for record in ended:
        is_good = record.is_ok and target_s is not None and record.total_s <= target_s
        rows.append([record.ended_s - before_s, record.is_ok, record.is_ok * record.num_images, is_good])
        before_s = record.ended_s
    return np.array(rows, dtype=np.float64)


def _rates(runs: Rows) -> Rows:
    sums = runs.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rates: Rows = sums[:, 1:] / sums[:, :1]
    return rates


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureChange:
    """A figure of two runs, and the relative change from the first to the second with its confidence interval."""

    name: str
    first: float
    second: float
    change: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low <= 0 <= self.high:
            return "no difference shown"
        return "higher" if self.change > 0 else "lower"


def differences(
    first: Sequence[Record], second: Sequence[Record], *, target_s: float | None, figures: tuple[dict[str, Any], dict[str, Any]]
) -> list[FigureChange]:
    """The changes of all figures that both runs have; `figures` are their measured values by the names of `Spread.figures`."""
    spreads = spread(first, target_s=target_s, seed=1), spread(second, target_s=target_s, seed=2)
    found = []
    for name in spreads[0].figures:
        if name not in spreads[1].figures or not figures[0].get(name) or figures[1].get(name) is None:
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = interval(spreads[1].figures[name] / spreads[0].figures[name] - 1)
        a, b = figures[0][name], figures[1][name]
        found.append(FigureChange(name=name, first=a, second=b, change=b / a - 1, low=low, high=high))
    return found


def by_name(summary: dict[str, Any]) -> dict[str, Any]:
    """The figures of a summary by the names of `Spread.figures`."""
    total = summary["latency_s"]["total"] or {}
    named = {f"total_{key}": value for key, value in total.items()}
    named |= {name: summary[name] for name in RATES}
    if "goodput" in summary:
        named[GOODPUT] = summary["goodput"]["requests_per_s"]
    return named

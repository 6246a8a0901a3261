"""How sure a run's figures are, and what of the difference between two runs is more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mii_serve.bench.statistics import PERCENTS, Rows, interval, resampled
from mii_serve.bench.values import Record

LEAST_ROWS = 10
"""Of fewer requests nothing can be said about the spread."""

LEAST_BEYOND = 2
"""A percentile with fewer requests above it hangs on single ones: of 100 requests the 99th is not to be compared."""

LATENCIES = ("total_mean", *(f"total_p{percent}" for percent in PERCENTS))
RATES = ("requests_per_s", "images_per_s")
GOODPUT = "goodput_per_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The re-drawn figures of one run by name, a value for each re-drawn run."""

    figures: dict[str, Rows]

    def intervals(self) -> dict[str, list[float]]:
        return {name: interval(values) for name, values in self.figures.items()}


def spread(records: Sequence[Record], *, target_s: float | None, seed: int = 0) -> Spread:
    """Re-draw a run; nothing of one with too few requests."""
    figures: dict[str, Rows] = {}
    well = sorted((record for record in records if record.is_ok), key=lambda record: record.intended_s)
    if len(well) >= LEAST_ROWS:
        drawn = resampled(np.array([[record.total_s] for record in well]), _latencies, seed=seed)
        enough = (True, *(len(well) * (100 - percent) >= 100 * LEAST_BEYOND for percent in PERCENTS))
        figures |= {name: values for name, values, is_kept in zip(LATENCIES, drawn.T, enough, strict=True) if is_kept}
    if len(records) >= LEAST_ROWS:
        drawn = resampled(_rows_of_rates(records, target_s), _rates, seed=seed)
        names = (*RATES, *((GOODPUT,) if target_s is not None else ()))
        figures |= dict(zip(names, drawn.T, strict=False))
    return Spread(figures=figures)


def _latencies(runs: Rows) -> Rows:
    totals = runs[..., 0]
    return np.concatenate((totals.mean(axis=1)[None], np.percentile(totals, PERCENTS, axis=1))).T


def _rows_of_rates(records: Sequence[Record], target_s: float | None) -> Rows:
    """In the order of their ends: the time since the end before, and what the request counts for."""
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
class Difference:
    """A figure of two runs, and how much larger the second is: a share, and the interval that holds it in 95 of 100 cases."""

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
) -> list[Difference]:
    """`figures` are what the two runs measured, by the names of `Spread.figures`."""
    spreads = spread(first, target_s=target_s, seed=1), spread(second, target_s=target_s, seed=2)
    found = []
    for name in spreads[0].figures:
        if name not in spreads[1].figures or not figures[0].get(name) or figures[1].get(name) is None:
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = interval(spreads[1].figures[name] / spreads[0].figures[name] - 1)
        a, b = figures[0][name], figures[1][name]
        found.append(Difference(name=name, first=a, second=b, change=b / a - 1, low=low, high=high))
    return found


def by_name(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary's figures by the names of `Spread.figures`."""
    total = summary["latency_s"]["total"] or {}
    named = {f"total_{key}": value for key, value in total.items()}
    named |= {name: summary[name] for name in RATES}
    if "goodput" in summary:
        named[GOODPUT] = summary["goodput"]["requests_per_s"]
    return named

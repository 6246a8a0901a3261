"""The figures of a load, from its records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mii_serve.bench.statistics import percentile, summarize
from mii_serve.bench.values import OK, REFUSALS, Record

ON_TIME_LAG_S = 0.01
"""Seconds. A request that is sent later than this after its time was delayed by the generator: by `max_in_flight`, or by a busy
machine.
"""


@dataclass(frozen=True, slots=True)
class Duration:
    """A column of durations: its name in a record (without `_s`) and in JSON, and its title in tables."""

    name: str
    title: str


DURATIONS = (
    Duration("total", "total"),
    Duration("queue", "until started"),
    Duration("first_step", "until the first step"),
    Duration("first_preview", "until the first preview"),
)


def duration_s(record: Record, name: str) -> float | None:
    value: float | None = getattr(record, f"{name}_s")
    return value


def summary(records: Sequence[Record], *, target_s: float | None) -> dict[str, Any]:
    """All figures of a load. Percentiles are of successful requests; the others count against throughput and goodput.

    `target_s`: a request counts as good if it succeeds within this many seconds.
    """
    well = [record for record in records if record.is_ok]
    # From the start of the load to its last answer: the time a server takes to drain counts, too.
    seconds = max((record.ended_s for record in records), default=0.0)
    codes = Counter(record.code for record in records)
    figures: dict[str, Any] = {
        "num_requests": len(records),
        "num_ok": len(well),
        "num_images": sum(record.num_images for record in well),
        "seconds": seconds,
        "requests_per_s": _rate(len(well), seconds),
        "images_per_s": _rate(sum(record.num_images for record in well), seconds),
        "codes": dict(sorted(codes.items())),
        "num_refused": sum(count for code, count in codes.items() if code in REFUSALS),
        "num_failed": sum(count for code, count in codes.items() if code != OK and code not in REFUSALS),
        "latency_s": latencies(well),
        "from_sent_s": summarize([record.ended_s - record.sent_s for record in well]),
        "by_kind": {
            kind: {
                "num_requests": sum(record.kind == kind for record in records),
                **latencies([record for record in well if record.kind == kind]),
            }
            for kind in sorted({record.kind for record in records})
        },
        "lag": _lag(records),
    }
    if target_s is not None:
        good = [record for record in well if record.total_s <= target_s]
        figures["goodput"] = {
            "target_s": target_s,
            "requests_per_s": _rate(len(good), seconds),
            "share": len(good) / len(records) if records else None,
        }
    return figures


def latencies(records: Sequence[Record]) -> dict[str, dict[str, float] | None]:
    found = {}
    for column in DURATIONS:
        values = [value for record in records if (value := duration_s(record, column.name)) is not None]
        found[column.name] = summarize(values)
    return found


def _lag(records: Sequence[Record]) -> dict[str, float] | None:
    """How late the generator sent the requests."""
    lags = [record.sent_s - record.intended_s for record in records]
    if not lags:
        return None
    return {
        "p99_s": percentile(lags, 99),
        "max_s": max(lags),
        "share_late": sum(lag > ON_TIME_LAG_S for lag in lags) / len(lags),
    }


def _rate(count: float, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None

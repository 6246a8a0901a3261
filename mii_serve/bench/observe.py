"""What a server says of its own work between two looks at its metrics: batch occupancy, step and stage times."""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from mii_serve.bench.http_wire import HttpError, HttpPool, Url
from mii_serve.types import Activity

SCRAPE_TIMEOUT_S = 10.0


@dataclass(slots=True)
class _Series:
    """One histogram, the labels that do not matter added up: observations, their sum, and the cumulated buckets."""

    count: float = 0.0
    total: float = 0.0
    buckets: dict[float, float] = field(default_factory=dict)

    def minus(self, before: _Series) -> _Series:
        buckets = {bound: count - before.buckets.get(bound, 0.0) for bound, count in self.buckets.items()}
        return _Series(self.count - before.count, self.total - before.total, buckets)

    def at_most(self, share: float) -> float | None:
        """The smallest bucket bound that this share of the observations does not exceed; None beyond the last."""
        for bound, count in sorted(self.buckets.items()):
            if count >= share * self.count:
                return bound if math.isfinite(bound) else None
        return None


Scrape = Mapping[tuple[str, str], _Series]
"""By the metric's name and the one label that is told apart."""

_WANTED = {
    "mii_serve_batch_size": "",
    "mii_serve_step_duration_seconds": "batch",
    "mii_serve_stage_duration_seconds": "stage",
    "mii_serve_queue_seconds": "",
}


def read_metrics(text: str) -> Scrape:
    """The histograms of `_WANTED` in a Prometheus text, those of all replicas together."""
    found: dict[tuple[str, str], _Series] = {}
    for family in text_string_to_metric_families(text):
        if family.name not in _WANTED:
            continue
        for sample in family.samples:
            series = found.setdefault((family.name, sample.labels.get(_WANTED[family.name], "")), _Series())
            if sample.name.endswith("_count"):
                series.count += sample.value
            elif sample.name.endswith("_sum"):
                series.total += sample.value
            elif sample.name.endswith("_bucket"):
                bound = float(sample.labels["le"])
                series.buckets[bound] = series.buckets.get(bound, 0.0) + sample.value
    return found


async def scrape(url: Url, tls: ssl.SSLContext | None = None, headers: Mapping[str, str] | None = None) -> Scrape | str:
    """A look at the server's metrics, or why there is none."""
    pool = HttpPool(url, tls=tls, headers=headers)
    try:
        async with asyncio.timeout(SCRAPE_TIMEOUT_S), pool.request("GET", "/metrics") as response:
            body = await response.read()
            return read_metrics(body.decode()) if response.status == 200 else f"/metrics answered {response.status}"
    except (HttpError, TimeoutError, ValueError) as error:
        return f"no metrics: {error or type(error).__name__}"
    finally:
        await pool.close()


def between(before: Scrape, after: Scrape) -> dict[str, Any]:
    """What happened between two looks, in images per UNet call and milliseconds; empty where the server measured nothing."""
    grown = {key: series.minus(before.get(key, _Series())) for key, series in after.items()}
    told: dict[str, Any] = {}
    sizes = grown.get(("mii_serve_batch_size", ""))
    if sizes and sizes.count > 0:
        told["images_per_call"] = sizes.total / sizes.count
        told["num_calls"] = int(sizes.count)
    steps = {
        label: series for (name, label), series in grown.items() if name.endswith("step_duration_seconds") and series.count > 0
    }
    if steps:
        total = sum(series.total for series in steps.values())
        told["step_ms"] = 1000 * total / sum(series.count for series in steps.values())
        told["step_ms_by_batch"] = {
            label: {
                "num_calls": int(steps[label].count),
                "mean_ms": 1000 * steps[label].total / steps[label].count,
                "p95_at_most_ms": None if (bound := steps[label].at_most(0.95)) is None else 1000 * bound,
            }
            for label in sorted(steps, key=lambda label: int(label or 0))
        }
    stages = {
        label: series for (name, label), series in grown.items() if name.endswith("stage_duration_seconds") and series.count > 0
    }
    if stages:
        told["stage_s"] = {label: series.total for label, series in sorted(stages.items())}
    queue = grown.get(("mii_serve_queue_seconds", ""))
    if queue and queue.count > 0:
        told["queue_s"] = queue.total / queue.count
    return told


def between_activities(before: Activity, after: Activity) -> dict[str, Any]:
    """The same from `GetServerInfo`, which every gRPC server of ours answers, with less detail."""
    num_calls = after.num_turns - before.num_turns
    if num_calls <= 0:
        return {}
    return {"images_per_call": (after.num_steps - before.num_steps) / num_calls, "num_calls": num_calls}

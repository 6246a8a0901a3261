"""What a server's Prometheus metrics say of its work during a load: images per UNet call, step, stage and queue times."""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from mii_serve.bench.http_client import AnswerTooLargeError, open_client, read_body

SCRAPE_TIMEOUT_S = 10.0


@dataclass(slots=True)
class _Series:
    """One histogram, summed over the labels that are not compared: observations, their sum, and the cumulative buckets by their
    upper bound.
    """

    count: float = 0.0
    total: float = 0.0
    buckets: dict[float, float] = field(default_factory=dict)

    def minus(self, before: _Series) -> _Series:
        buckets = {bound: count - before.buckets.get(bound, 0.0) for bound, count in self.buckets.items()}
        return _Series(self.count - before.count, self.total - before.total, buckets)

    def at_most(self, share: float) -> float | None:
        """The smallest bucket bound that this share of the observations does not exceed; None if it is beyond the last."""
        for bound, count in sorted(self.buckets.items()):
            if count >= share * self.count:
                return bound if math.isfinite(bound) else None
        return None


Scrape = Mapping[tuple[str, str], _Series]
"""Histograms by the metric's name and the value of the one label that is kept (empty where none is)."""

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


async def scrape(address: str, tls: ssl.SSLContext | None = None, headers: Mapping[str, str] | None = None) -> Scrape | str:
    """The histograms that `/metrics` shows now, or the reason why they cannot be read.

    `address`: what `http_address` returns.
    """
    try:
        async with (
            asyncio.timeout(SCRAPE_TIMEOUT_S),
            open_client(address, tls=tls, headers=headers) as client,
            client.stream("GET", "/metrics") as response,
        ):
            body = await read_body(response)
            return read_metrics(body.decode()) if response.status_code == 200 else f"/metrics answered {response.status_code}"
    except (httpx2.HTTPError, AnswerTooLargeError, TimeoutError, ValueError) as error:
        return f"no metrics: {type(error).__name__}: {error}".removesuffix(": ")


def between(before: Scrape, after: Scrape) -> dict[str, Any]:
    """What a server did between two scrapes: images per UNet call, and times in seconds or, where the key says so, in
    milliseconds. Empty where the server measured nothing.
    """
    grown = {key: series.minus(before.get(key, _Series())) for key, series in after.items()}
    observed: dict[str, Any] = {}
    sizes = grown.get(("mii_serve_batch_size", ""))
    if sizes and sizes.count > 0:
        observed["images_per_call"] = sizes.total / sizes.count
        observed["num_calls"] = int(sizes.count)
    if steps := _by_label(grown, "mii_serve_step_duration_seconds"):
        total = sum(series.total for series in steps.values())
        observed["step_ms"] = 1000 * total / sum(series.count for series in steps.values())
        observed["step_ms_by_batch"] = {
            label: {
                "num_calls": int(steps[label].count),
                "mean_ms": 1000 * steps[label].total / steps[label].count,
                "p95_at_most_ms": None if (bound := steps[label].at_most(0.95)) is None else 1000 * bound,
            }
            for label in sorted(steps, key=lambda label: int(label or 0))
        }
    if stages := _by_label(grown, "mii_serve_stage_duration_seconds"):
        observed["stage_s"] = {label: series.total for label, series in sorted(stages.items())}
    queue = grown.get(("mii_serve_queue_seconds", ""))
    if queue and queue.count > 0:
        observed["queue_s"] = queue.total / queue.count
    return observed


def _by_label(grown: Scrape, metric: str) -> dict[str, _Series]:
    return {label: series for (name, label), series in grown.items() if name == metric and series.count > 0}

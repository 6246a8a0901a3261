"""The plot of an evaluation: how the model trades likeness for obedience as the guidance scale grows. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mii_serve.bench.plots import to_svg
from mii_serve.evaluate.measure import CLIP, FD, FID, FLAGGED

PLOT_INCHES = (4.4, 3.4)


def pareto(report: Mapping[str, Any]) -> str | None:
    """An SVG: one distance against one measure of what the prompt asks for where there are both, then each over the scales.

    None where nothing but the share of flagged pictures was measured.
    """
    metrics = [metric["name"] for metric in report["metrics"] if metric["name"] != FLAGGED]
    if not metrics:
        return None
    distance = next((name for name in (FID, FD) if name in metrics), None)
    obedience = next((name for name in (CLIP, *metrics) if name in metrics and name not in (FID, FD)), None)
    alone = [name for name in (obedience, distance) if name is not None]
    has_both = len(alone) == 2
    count = len(alone) + has_both
    figure = Figure(figsize=(PLOT_INCHES[0] * count, PLOT_INCHES[1]), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False).flat)
    if distance is not None and obedience is not None:
        _against(axes.pop(0), report["rows"], distance, obedience)
    for plot, name in zip(axes, alone, strict=True):
        floor = next(metric.get("floor") for metric in report["metrics"] if metric["name"] == name)
        _over_scales(plot, report["rows"], name, floor)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{to_svg(figure)}'


def _against(axes: Axes, rows: Sequence[Mapping[str, Any]], distance: str, obedience: str) -> None:
    x, y = ([row["estimates"][name] for row in rows] for name in (distance, obedience))
    axes.errorbar(
        [one["value"] for one in x], [one["value"] for one in y], xerr=_reach(x), yerr=_reach(y), fmt="o-", capsize=2, lw=1
    )
    for row, left, up in zip(rows, x, y, strict=True):
        place = left["value"], up["value"]
        axes.annotate(f"{row['guidance_scale']:g}", place, textcoords="offset points", xytext=(5, 5), fontsize="small")
    axes.set(title="by guidance scale", xlabel=f"{distance} (less is better)", ylabel=f"{obedience} (more is better)")
    axes.grid(alpha=0.3)


def _over_scales(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, floor: float | None) -> None:
    found = [row["estimates"][name] for row in rows]
    scales = [row["guidance_scale"] for row in rows]
    axes.errorbar(scales, [one["value"] for one in found], yerr=_reach(found), fmt="o-", capsize=2, lw=1)
    if floor is not None:
        axes.axhline(floor, color="#aa2222", linestyle="--", label="between halves of the reference")
        axes.legend(fontsize="small")
    axes.set(title=name, xlabel="guidance scale")
    axes.grid(alpha=0.3)


def _reach(estimates: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """How far the intervals reach below and above."""
    below = [0.0 if one["low"] is None else max(0.0, one["value"] - one["low"]) for one in estimates]
    above = [0.0 if one["high"] is None else max(0.0, one["high"] - one["value"]) for one in estimates]
    return [below, above]

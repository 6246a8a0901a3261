"""A result, or the comparison of two, as tables for the terminal."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mii_serve.bench.result import Result
from mii_serve.bench.statistics import PERCENTS
from mii_serve.bench.summary import DURATIONS

COLUMNS = ("mean", *(f"p{percent}" for percent in PERCENTS), "max")


def show(result: Result, console: Console) -> None:
    console.print(_overview(result))
    console.print()
    console.print(_latencies(result))
    if len(result.summary["by_kind"]) > 1:
        console.print()
        console.print(_kinds(result))


def overview(result: Result) -> list[tuple[str, str]]:
    """Names and values of everything but the latencies, for the terminal and the page."""
    figures, intervals = result.summary, result.summary["intervals"]
    lines = [
        ("server", _server(result)),
        ("load", f"{result.settings['loop']}, {result.settings['protocol']}, seed {result.settings['seed']}"),
        ("requests", f"{figures['num_requests']} in {figures['seconds']:.1f} s, {figures['num_ok']} successful"),
        (
            "throughput",
            f"{rate(figures['requests_per_s'])} requests/s{between(intervals.get('requests_per_s'))}, "
            f"{rate(figures['images_per_s'])} images/s",
        ),
    ]
    if goodput := figures.get("goodput"):
        share = "" if goodput["share"] is None else f", {100 * goodput['share']:.1f} % of all"
        within = f"within {goodput['target_s']:g} s"
        lines.append(
            (
                "goodput",
                f"{rate(goodput['requests_per_s'])} requests/s {within}{between(intervals.get('goodput_per_s'))}{share}",
            )
        )
    lines.append(("refused, failed", f"{figures['num_refused']}, {figures['num_failed']}"))
    for code, count in figures["codes"].items():
        if code != "OK":
            lines.append((f"  {code}", f"{count}: {result.examples.get(code, '')[:160]}"))
    if lag := figures["lag"]:
        lines.append(("sent late", f"{100 * lag['share_late']:.1f} % of the requests, at most {lag['max_s']:.2f} s; it counts"))
    lines += _observed(result.observed)
    if not intervals and importlib.util.find_spec("numpy") is None:
        lines.append(("intervals", "none: they need numpy, which the extra 'bench' installs"))
    lines.append(("pictures", picture_check(result)))
    return lines


def picture_check(result: Result) -> str:
    """The result of the check in one sentence."""
    check = result.check
    if check["is_ok"] is None:
        return f"NOT CHECKED: {check['text']}"
    wrong = [one for one in check["pictures"] if not one["is_ok"]]
    levels = max((one["max_levels"] for one in check["pictures"] if one["max_levels"] is not None), default=None)
    furthest = "" if levels is None else f", at most {levels} levels of 255 off"
    if wrong:
        first = wrong[0]
        why = first["text"] or f"{first['max_levels']} levels off"
        return (
            f"REJECTED: {len(wrong)} of {len(check['pictures'])} are not those of the {check['reference']}; "
            f"request {first['index']} ({first['kind']}): {why}"
        )
    return f"{len(check['pictures'])} checked against the {check['reference']}, all right{furthest}"


def latency_rows(result: Result) -> list[tuple[str, Mapping[str, float]]]:
    """Title and figures, in seconds, of each duration that was measured, and of the total counted from sending."""
    measured = result.summary["latency_s"]
    rows = [(column.title, found) for column in DURATIONS if (found := measured[column.name]) is not None]
    if (sent := result.summary["from_sent_s"]) is not None:
        rows.append(("total, from sending only", sent))
    return rows


def kind_rows(result: Result) -> Iterator[Sequence[str]]:
    """For each kind: its name, its number of requests, and its total in seconds by `COLUMNS`."""
    for kind, figures in result.summary["by_kind"].items():
        total = figures["total"]
        values = ["-"] * len(COLUMNS) if total is None else [f"{total[column]:.3f}" for column in COLUMNS]
        yield (kind, str(figures["num_requests"]), *values)


def differences(compared: Mapping[str, Any], console: Console) -> None:
    table = _table("", "first", "second", "change", "95 % interval", "")
    for one in compared["differences"]:
        change = f"{100 * one['change']:+.1f} %"
        span = f"{100 * one['low']:+.1f} to {100 * one['high']:+.1f} %" if one["low"] is not None else "-"
        name = one["name"].replace("_per_s", "/s").replace("_", " ")
        table.add_row(name, f"{one['first']:.4g}", f"{one['second']:.4g}", change, span, one["verdict"])
    for line in compared["unlike"]:
        console.print(Text(f"they differ in {line}", style="yellow"))
    for name in compared["unchecked"]:
        console.print(Text(f"the pictures of the {name} run were not checked", style="yellow"))
    for name in compared["rejected"]:
        console.print(Text(f"the {name} run was rejected: a picture is wrong, so its figures do not count", style="red"))
    console.print(table)


def rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def between(interval: list[float] | None) -> str:
    return "" if interval is None or None in interval else f" (95 %: {interval[0]:.2f} to {interval[1]:.2f})"


def _server(result: Result) -> str:
    server = result.server
    if not server:
        return f"{result.settings['target']}, reports nothing of itself"
    return f"{server['model']} {server['model_revision']}, {server['engine']} {server['dtype']} on {server['device']}"


def _observed(observed: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = []
    if "images_per_call" in observed:
        lines.append(("batch", f"{observed['images_per_call']:.2f} images a UNet call, {observed['num_calls']} calls"))
    if "step_ms" in observed:
        parts = ", ".join(f"{steps['mean_ms']:.1f} at {label}" for label, steps in observed["step_ms_by_batch"].items())
        lines.append(("step", f"{observed['step_ms']:.1f} ms on average; by images in the call, up to: {parts}"))
    if "stage_s" in observed:
        lines.append(("stages", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in observed["stage_s"].items())))
    if "text" in observed:
        lines.append(("metrics", observed["text"]))
    return lines


def _overview(result: Result) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in overview(result):
        style = "" if name != "pictures" or result.check["is_ok"] else "red" if result.is_rejected else "yellow"
        table.add_row(name, Text(value, style=style))
    return table


def _latencies(result: Result) -> Table:
    table = _table("seconds from the intended start", *COLUMNS)
    intervals = result.summary["intervals"]
    for title, found in latency_rows(result):
        table.add_row(title, *(f"{found[column]:.3f}" for column in COLUMNS))
        if title == "total" and "total_mean" in intervals:
            bounds = [intervals.get(f"total_{column}") for column in COLUMNS]
            table.add_row("  95 % interval", *("" if pair is None else f"{pair[0]:.3f}-{pair[1]:.3f}" for pair in bounds))
    return table


def _kinds(result: Result) -> Table:
    table = _table("total by kind", "requests", *COLUMNS)
    for row in kind_rows(result):
        table.add_row(*row)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=bool(index))
    return table

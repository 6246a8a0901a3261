"""A result as one page: everything in it, nothing fetched, no script."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from mii_serve.bench.result import Result
from mii_serve.bench.statistics import percentile
from mii_serve.bench.svg import Plot, Series
from mii_serve.bench.tables import COLUMNS, facts, latency_rows
from mii_serve.bench.values import Record

_STYLE = """
body { font: 14px/1.5 sans-serif; color: #222; max-width: 1340px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: 2px 12px 2px 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } th { color: #666; font-weight: normal; }
table.facts td { text-align: left; vertical-align: top; } table.facts td:first-child { color: #666; white-space: nowrap; }
svg { margin: 6px; max-width: 100%; height: auto; border: 1px solid #eee; }
.bad { background: #aa2222; color: #fff; padding: 6px 12px; } .unsure { background: #f3d27a; padding: 6px 12px; }
pre { background: #f6f6f6; padding: 8px; overflow-x: auto; }
"""


def page(result: Result) -> str:
    """The page; its text is escaped, prompts and pictures are not in it."""
    title = f"mii_serve bench, {result.about['date']}"
    banner = ""
    if result.is_rejected:
        banner = '<p class="bad">The pictures are wrong. These figures are worth nothing.</p>'
    elif result.check["is_ok"] is None:
        banner = '<p class="unsure">The pictures were not checked against the reference.</p>'
    told = {"about": result.about, "settings": result.settings, "server": result.server}
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"/><title>{escape(title)}</title><style>{_STYLE}</style></head><body>',
        f"<h1>{escape(title)}</h1>",
        banner,
        '<table class="facts">',
        *(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts(result)),
        "</table>",
        "<h2>Seconds from the intended start</h2>",
        _table(
            ("", *COLUMNS), [(name, *(f"{found[column]:.3f}" for column in COLUMNS)) for name, found in latency_rows(result)]
        ),
        "<h2>Total by kind</h2>",
        _table(("", "requests", *COLUMNS), _kind_rows(result)),
        "<h2>Plots</h2>",
        *(plot.svg() for plot in plots(result.records, result.target_s)),
        "<h2>To repeat it</h2>",
        f"<pre>{escape(json.dumps(told, indent=1, default=str))}</pre>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def plots(records: Sequence[Record], target_s: float | None) -> list[Plot]:
    """Whichever have something to show."""
    well = [record for record in records if record.is_ok]
    kinds = sorted({record.kind for record in records})
    found = []
    if well:
        found.append(
            Plot(
                title="How many were ready by then",
                x_label="seconds from the intended start",
                y_label="% of all requests",
                series=[Series(name=kind, points=_distribution(records, kind)) for kind in kinds],
                rule_x=None if target_s is None else (target_s, f"target {target_s:g} s"),
            )
        )
        found.append(
            Plot(
                title="Each request",
                x_label="seconds into the load when it was meant to start",
                y_label="total, s",
                series=[
                    Series(name=kind, style="dots", points=[(r.intended_s, r.total_s) for r in well if r.kind == kind])
                    for kind in kinds
                ],
            )
        )
    if records:
        found.append(_per_second(records))
        found.append(_under_way(records))
    if len(kinds) > 1 and well:
        present = [kind for kind in kinds if any(record.kind == kind for record in well)]
        totals = {kind: [record.total_s for record in well if record.kind == kind] for kind in present}
        found.append(
            Plot(
                title="Total by kind",
                x_label="kind",
                y_label="seconds",
                x_names=present,
                series=[
                    Series(
                        name=f"p{percent}",
                        style="marked",
                        points=[(float(i), percentile(totals[kind], percent)) for i, kind in enumerate(present)],
                    )
                    for percent in (50, 95)
                ],
            )
        )
    return found


def _distribution(records: Sequence[Record], kind: str) -> list[tuple[float, float]]:
    """A failed request is never ready: the line ends below 100 %."""
    of_kind = [record for record in records if record.kind == kind]
    steps, share = [(0.0, 0.0)], 0.0
    for rank, total_s in enumerate(sorted(record.total_s for record in of_kind if record.is_ok)):
        steps.append((total_s, share))
        share = 100 * (rank + 1) / len(of_kind)
        steps.append((total_s, share))
    return steps


def _per_second(records: Sequence[Record]) -> Plot:
    ends = Counter(int(record.ended_s) for record in records if record.is_ok)
    others = Counter(int(record.ended_s) for record in records if not record.is_ok)
    last = max([*ends, *others])
    series = [Series(name="went well", style="bars", points=[(second + 0.5, ends[second]) for second in range(last + 1)])]
    if others:
        series.append(Series(name="refused or failed", points=[(second + 0.5, others[second]) for second in range(last + 1)]))
    return Plot(title="Ended in each second", x_label="seconds into the load", y_label="requests", series=series)


def _under_way(records: Sequence[Record]) -> Plot:
    changes = sorted([(record.intended_s, 1) for record in records] + [(record.ended_s, -1) for record in records])
    points, count = [(0.0, 0.0)], 0
    for at_s, change in changes:
        points.append((at_s, float(count)))
        count += change
        points.append((at_s, float(count)))
    return Plot(
        title="Meant to have started, and not ended",
        x_label="seconds into the load",
        y_label="requests",
        series=[Series(name="", points=points)],
    )


def _kind_rows(result: Result) -> Iterable[Sequence[str]]:
    for kind, told in result.summary["by_kind"].items():
        found = told["total"]
        cells = ["-"] * len(COLUMNS) if found is None else [f"{found[column]:.3f}" for column in COLUMNS]
        yield (kind, str(told["num_requests"]), *cells)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"

"""A result as one HTML page: it fetches nothing and has no script. Needs matplotlib, for the plots."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

from mii_serve.bench.plots import draw, to_svg
from mii_serve.bench.result import Result
from mii_serve.bench.tables import COLUMNS, kind_rows, latency_rows, overview

_STYLE = """
body { font: 14px/1.5 sans-serif; color: #222; max-width: 1340px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: 2px 12px 2px 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } th { color: #666; font-weight: normal; }
table.overview td { text-align: left; vertical-align: top; } table.overview td:first-child { color: #666; white-space: nowrap; }
svg { max-width: 100%; height: auto; }
.bad { background: #aa2222; color: #fff; padding: 6px 12px; } .unsure { background: #f3d27a; padding: 6px 12px; }
pre { background: #f6f6f6; padding: 8px; overflow-x: auto; }
"""


def page(result: Result) -> str:
    """The page. Every text in it is escaped."""
    title = f"mii_serve bench, {result.about['date']}"
    banner = ""
    if result.is_rejected:
        banner = '<p class="bad">A picture is wrong. These figures do not count.</p>'
    elif result.check["is_ok"] is None:
        banner = '<p class="unsure">The pictures were not checked against the reference.</p>'
    circumstances = {"about": result.about, "settings": result.settings, "server": result.server}
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"/><title>{escape(title)}</title><style>{_STYLE}</style></head><body>',
        f"<h1>{escape(title)}</h1>",
        banner,
        '<table class="overview">',
        *(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in overview(result)),
        "</table>",
        "<h2>Seconds from the intended start</h2>",
        _table(
            ("", *COLUMNS), [(name, *(f"{found[column]:.3f}" for column in COLUMNS)) for name, found in latency_rows(result)]
        ),
        "<h2>Total by kind</h2>",
        _table(("", "requests", *COLUMNS), kind_rows(result)),
        "<h2>Plots</h2>",
        "" if (figure := draw(result.records, result.target_s)) is None else to_svg(figure),
        "<h2>To repeat it</h2>",
        f"<pre>{escape(json.dumps(circumstances, indent=1, default=str))}</pre>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"

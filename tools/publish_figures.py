#!/usr/bin/env python3
"""Writes the tables of measured figures into the docs, from the files in benchmarks/results; `--check` only compares.

A table stands between `<!-- figures: NAME -->` and `<!-- end -->`. A figure that no file holds is one that nobody measured.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
TABLE = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return loaded


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(header)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def inflight() -> str:
    result = read("inflight-demo.json")
    steps = ("10", "20", "30", "50")
    rows = []
    for row in result["rows"]:
        means = [f"{row['latency_s_by_steps'][n]['mean']:.2f}" for n in steps]
        rows.append([f"{row['policy']}, load {row['load']:g}", *means, f"{row['latency_s']['p95']:.2f}", row["images_per_s"]])
    table = markdown(["", *(f"{n} steps" for n in steps), "p95, all", "images/s"], rows)
    capacity = ", ".join(f"{name} {value:.1f}" for name, value in result["capacity_images_per_s"].items())
    share = max(row["loop_share"] for row in result["rows"] if row["policy"] == "in-flight")
    about = f"{result['num_requests']} requests a run, {result['max_slots']} slots, {result['device']}, {result['dtype']}"
    return (
        f"Capacity in images/s with everything queued at once: {capacity}.\n"
        f"Mean latency in seconds by number of steps ({about}):\n\n"
        f"{table}\nThe loop around the engine takes {100 * share:.1f} % of the engine's time.\n"
    )


def savings() -> str:
    result = read("savings-demo-cpu.json")
    names = [name for name in result["rows"][0]["times_faster"] if name != "diffusers"]
    rows = [
        [row["guided_samples"], row["diffusers_ms"], *(f"{row['times_faster'][name]:.2f}" for name in names)]
        for row in result["rows"]
    ]
    header = ["guided samples", "diffusers, ms", *(name.replace("_", " ") for name in names)]
    return f"Times faster than diffusers' own forward ({result['device']}, {result['dtype']}):\n\n{markdown(header, rows)}"


def scheduler() -> str:
    rows = read("scheduler-cost.json")["rows"]
    cells = [
        [f"{row['num_slots']} slots, {row['num_waiting']} wait", row["turn_us"]["median"], row["turn_us"]["p99"]]
        for row in rows
    ]
    return f"`plan` and `advance` together, in microseconds:\n\n{markdown(['', 'median', 'p99'], cells)}"


TABLES: dict[str, Callable[[], str]] = {"inflight": inflight, "savings": savings, "scheduler": scheduler}


def published(text: str) -> str:
    """The page with its tables as the files have them."""
    return TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", text)


def main() -> int:
    is_check, stale = "--check" in sys.argv[1:], []
    for page in PAGES:
        text = page.read_text()
        if (new := published(text)) != text:
            stale.append(str(page.relative_to(ROOT)))
            if not is_check:
                page.write_text(new)
    print("\n".join(stale) or "all figures are those of the files")
    return int(is_check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())

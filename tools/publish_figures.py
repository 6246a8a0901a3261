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


def front() -> str:
    result = read("front-cost.json")
    ways = ("echo", "replica", "front")
    latency = ["median latency, ms", *(result["latency_ms"][way] for way in ways)]
    rate = [f"requests/s, {result['concurrency']} callers", *(result["requests_per_s"][way] for way in ways)]
    table = markdown(["", "bare echo", "replica asked directly", "through the front"], [latency, rate])
    size = f"{result['picture_bytes'] / 1000:.0f} KB"
    return (
        f"An engine that computes nothing, one picture of {size} an answer, {result['cores']} cores for all four processes "
        f"({result['device']}):\n\n{table}\nThe front adds {result['added_ms']} ms at the median; "
        f"throughput is {result['throughput_times_echo']:.2f} of the bare echo's.\n"
    )


def overload() -> str:
    result = read("overload-demo.json")
    able = result["capacity_per_s"]
    cells = [
        ["requests/s it can do, before and after", f"{able['before']}, {able['after']}"],
        ["requests/s offered", result["offered_per_s"]],
        ["pictures/s meanwhile", f"{result['goodput_per_s']} ({100 * result['goodput_of_capacity']:.0f} %)"],
        ["a refusal takes, median and p95", f"{result['refusal_ms']['median']} ms, {result['refusal_ms']['p95']} ms"],
        ["accepted and not in time", result["accepted_but_late"]],
        ["front, MiB, at the start and the end", ", ".join(str(result["memory_mib"][i]["front"]) for i in (0, -1))],
    ]
    about = f"{result['seconds']:g} s, deadline {result['timeout']:g} s, line of at most {result['max_waiting_s']:g} s"
    return f"The built-in model on {result['cores']} cores, {about}:\n\n{markdown(['', ''], cells)}"


TABLES: dict[str, Callable[[], str]] = {table.__name__: table for table in (inflight, savings, scheduler, front, overload)}


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

#!/usr/bin/env python3
"""Writes the tables and plots of measured figures into the docs, from the files in benchmarks/results; `--check` only compares.

A table stands between `<!-- figures: NAME -->` and `<!-- end -->`. A figure that no file holds was not measured.
`figures/` makes the tables.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

from figures import batching, devices, serving
from figures.files import RESULTS, ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
TABLE = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PLOTS: dict[str, Callable[[], str]] = {"peers-demo.svg": serving.peers_plot}
TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        batching.inflight,
        batching.savings,
        batching.scheduler,
        batching.host_cost,
        batching.batch,
        batching.batch_interference,
        batching.batch_job,
        batching.evaluate,
        serving.front,
        serving.overload,
        serving.engines,
        serving.engines_in_turn,
        serving.peers,
        serving.peers_in_turn,
        serving.threads,
        serving.start,
        serving.ray_proxy,
        devices.ranks,
        devices.ranks_computed,
        devices.loras,
        devices.roofline,
        devices.kernel_times,
        devices.gpu_tests,
        devices.kernel_resources,
        serving.provenance,
        serving.watermark,
    )
}


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
    for name, plot in PLOTS.items():
        file, drawn = RESULTS / name, plot()
        if drawn and (not file.exists() or file.read_text() != drawn):
            stale.append(str(file.relative_to(ROOT)))
            if not is_check:
                file.write_text(drawn)
    print("\n".join(stale) or "all figures are those of the files")
    return int(is_check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())

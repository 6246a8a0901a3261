"""The tables of figures in the docs are those of the measured files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_no_table_differs_from_its_file():
    command = [sys.executable, "tools/publish_figures.py", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, f"run tools/publish_figures.py; stale: {checked.stdout}"


def test_there_are_tables_to_check():
    pages = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    for name in (
        "batch",
        "batch_interference",
        "batch_job",
        "clients",
        "engines",
        "evaluate",
        "front",
        "host_cost",
        "inflight",
        "kernel_resources",
        "overload",
        "peers",
        "provenance",
        "ray_proxy",
        "roofline",
        "savings",
        "scheduler",
        "start",
        "threads",
        "watermark",
    ):
        assert f"<!-- figures: {name} -->\n\n" in pages

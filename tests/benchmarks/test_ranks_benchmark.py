"""`benchmarks/ranks.py` in its smallest configuration. What `tensor` sends is counted in numeric/test_sharded_ranks.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_smoke_run_counts_what_the_formula_says(tmp_path):
    out = tmp_path / "ranks.json"
    smallest = ["--device", "cpu", "--ranks", "2", "--samples", "1", "--calls", "2", "--repeats", "1", "--out", str(out)]
    command = [sys.executable, "benchmarks/ranks.py", *smallest, "--modes", "one rank", "rows"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    written = json.loads(out.read_text())
    rows = {row["mode"]: row for row in written["rows"]}
    height, width = written["height"] // 8, written["width"] // 8
    counted = {mode: (row["collectives_per_call"], row["sent_bytes_per_call"]) for mode, row in rows.items()}
    assert counted == {
        "one rank": (0, 0),
        "rows": (1, 4 * height * width * 4),  # each rank one row of the guided sample, in float32
    }
    for row in rows.values():
        assert 0 < row["ms_per_call"]["min"] <= row["ms_per_call"]["median"] <= row["ms_per_call"]["max"]
    assert {mode: len(held) for mode, held in written["memory_mib_per_rank"].items()} == {"one rank": 1, "rows": 2}
    assert {"commit", "date", "device", "versions", "command", "num_ranks"} <= set(written)

#!/usr/bin/env python3
"""Run the tests that need a GPU, the most telling first, and keep each result: `make gpu-test`.

python benchmarks/gpu_tests.py              nine minutes at most; what is left over is named
python benchmarks/gpu_tests.py              again: what passed on this commit and device is not run again
python benchmarks/gpu_tests.py --again      all of them
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mii_serve.bench import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
FOLDER = ROOT / "tests" / "gpu"
ORDER = (
    "test_fused_on_cuda",
    "test_native_on_cuda",
    "test_reference_on_cuda",
    "test_verify_on_cuda",
    "test_deepspeed_on_cuda",
)
"""By what a first run on a GPU should say first: are the kernels right, are the graphs, are the pictures."""


MAX_TEST_S = 240
"""What takes longer hangs, and ends the run."""


class KeptResults:
    """A pytest plugin: orders the tests, leaves out those that passed before and those there is no time for, keeps the rest.

    A test that ended the process comes last in the next run.
    """

    def __init__(self, out: Path, about: dict[str, Any], *, budget_s: float, order: Sequence[str] = ORDER) -> None:
        self._out, self._about, self._order = out, about, order
        self._ends = time.monotonic() + budget_s
        self.results: dict[str, dict[str, Any]] = {}
        self._cut_short: set[str] = set()

    def resume(self) -> None:
        """Take in what an earlier run on this device and commit found."""
        if not self._out.exists():
            return
        before = json.loads(self._out.read_text())
        if all(before.get(name) == self._about.get(name) for name in ("commit", "device", "versions")):
            self.results = {name: row for name, row in before["tests"].items() if row["outcome"] == "passed"}
            self._cut_short = {name for name, row in before["tests"].items() if row["outcome"] == "begun"}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        known = [item for item in items if item.nodeid in self.results]
        config.hook.pytest_deselected(items=known)
        left = [item for item in items if item.nodeid not in self.results]
        items[:] = sorted(left, key=lambda item: (item.nodeid in self._cut_short, self._place(item.path.stem)))

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() > self._ends:
            pytest.skip("no time left")
        self.results[item.nodeid] = {"outcome": "begun", "seconds": 0.0}  # it may end the process
        self._write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            text = "" if report.outcome == "passed" else str(report.longrepr)[-1500:]
            seconds = round(report.duration, 2)
            self.results[report.nodeid] = {"outcome": report.outcome, "seconds": seconds, **({"text": text} if text else {})}
            self._write()

    def _place(self, name: str) -> int:
        return self._order.index(name) if name in self._order else len(self._order)

    def _write(self) -> None:
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._out.write_text(json.dumps({**self._about, "tests": self.results}, indent=1) + "\n")

    def table(self) -> str:
        """One line for each test."""
        return "".join(f"{row['outcome']:8} {row['seconds']:7.2f} s  {name}\n" for name, row in self.results.items())


def device() -> str:
    """The name of the first GPU; the processor's where there is none."""
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return environment.device()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=520.0, metavar="SECONDS")
    parser.add_argument("--again", action="store_true", help="also what passed before")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, help="the JSON file to write; named after the device when left out")
    arguments = parser.parse_args()
    about = environment.circumstances((*environment.PACKAGES, "triton", "deepspeed")) | {"device": device()}
    name = "".join(letter if letter.isalnum() else "-" for letter in about["device"]).lower()
    kept = KeptResults(arguments.out or RESULTS / f"gpu-tests-{name}.json", about, budget_s=arguments.budget)
    if not arguments.again:
        kept.resume()
    sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks", "tests/support")]
    # Without the project's configuration, which asks for plugins and turns warnings into errors: neither is about a GPU.
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(ROOT)]
    options += ["--confcutdir", str(ROOT)]
    options += ["-o", f"faulthandler_timeout={MAX_TEST_S}", "-o", "faulthandler_exit_on_timeout=true"]
    code = pytest.main([*options, "-W", "ignore::pytest.PytestUnknownMarkWarning", str(arguments.folder)], plugins=[kept])
    sys.stdout.write(kept.table())
    return 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED and kept.results else int(code)


if __name__ == "__main__":
    sys.exit(main())

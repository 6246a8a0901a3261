"""The commands for a GPU: what they keep, in which order they run, and that they go on where they stopped. Without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import kernel_times
import pytest
from operation_doubles import fast_device, tiny_model
from patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


def run_tests(folder: Path, *flags: str) -> tuple[int, dict[str, str], str]:
    """The exit code, the outcome of each test kept in the file, and what was printed."""
    out = folder / "results.json"
    command = [sys.executable, "benchmarks/gpu_tests.py", "--folder", str(folder), "--out", str(out), *flags]
    alone = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=alone)
    kept = json.loads(out.read_text())
    assert {"commit", "device", "versions"} <= set(kept), ran.stderr
    return ran.returncode, {name.rpartition("::")[2]: row["outcome"] for name, row in kept["tests"].items()}, ran.stdout


def test_gpu_tests_run_in_order_and_what_passed_is_not_run_again(tmp_path):
    gpu = "import pytest\npytestmark = pytest.mark.gpu\n"
    (tmp_path / "test_deepspeed_on_cuda.py").write_text(gpu + "def test_last(): pass\n")
    (tmp_path / "test_fused_on_cuda.py").write_text(gpu + "def test_first(): pass\ndef test_second(): assert False\n")
    code, outcomes, _ = run_tests(tmp_path)
    assert (code, list(outcomes.items())) == (1, [("test_first", "passed"), ("test_second", "failed"), ("test_last", "passed")])
    code, outcomes, printed = run_tests(tmp_path, "--budget", "0")
    assert code == 0 and "1 skipped, 2 deselected" in printed
    assert outcomes == {"test_first": "passed", "test_second": "skipped", "test_last": "passed"}
    assert "no time left" in (tmp_path / "results.json").read_text()


def test_a_test_that_ends_the_process_is_the_last_one_of_the_next_run(tmp_path):
    gpu = "import os, pytest\npytestmark = pytest.mark.gpu\n"
    (tmp_path / "test_fused_on_cuda.py").write_text(gpu + "def test_killer(): os._exit(3)\ndef test_other(): pass\n")
    code, outcomes, _ = run_tests(tmp_path)
    assert (code, outcomes) == (3, {"test_killer": "begun"})
    code, outcomes, _ = run_tests(tmp_path)
    assert (code, list(outcomes.items())) == (3, [("test_other", "passed"), ("test_killer", "begun")])


class TestKernelTimes:
    def measure(self, out: Path, budget_s: float = 600.0, *, commit: str = "a", has_clock: bool = True) -> dict:
        device = fast_device()[0] if has_clock else replace(fast_device()[0], time_ms=None)
        about = {"device": "d", "commit": commit}
        return kernel_times.measure(tiny_model(), device, about=about, out=out, budget_s=budget_s, num_samples=(1, 2))

    def test_every_shape_is_kept_and_none_is_measured_again(self, tmp_path):
        out = tmp_path / "times.json"
        found = self.measure(out)
        assert {one["operation"] for one in found["measurements"]} == {
            "group_norm", "upsample", "layer_norm", "linear_geglu", "attention", "sampler",
        }  # fmt: skip
        assert {one["fastest"] for one in found["measurements"]} == {"fast"}
        assert "cudnn" in json.dumps(found["refused"]), "an attention that is not there is named"
        assert "fast 500.0, torch 1000.0" in kernel_times.table(found)
        whole = [(one["what"], one["num_samples"], set(one["ms"]) == set(kernel_times.CONVOLUTIONS)) for one in found["calls"]]
        assert whole == [("UNet call", 1, True), ("decode", 1, True), ("UNet call", 2, True)]
        assert self.measure(out, has_clock=False) == found

    def test_what_there_was_no_time_for_is_measured_by_the_next_run(self, tmp_path):
        out, whole = tmp_path / "times.json", self.measure(tmp_path / "whole.json")
        counts = []
        while len(counts) < 2:
            counts.append(len(self.measure(out, budget_s=-1.0)["measurements"]))
        assert counts == [1, 2]
        assert self.measure(out)["measurements"] == whole["measurements"]

    def test_another_commit_is_measured_from_the_start(self, tmp_path):
        out = tmp_path / "times.json"
        self.measure(out, commit="a")
        assert len(self.measure(out, budget_s=-1.0, commit="b")["measurements"]) == 1

    def test_without_a_gpu_it_says_so(self, monkeypatch):
        monkeypatch.setattr(kernel_times.torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", ["kernel_times.py"])
        with pytest.raises(SystemExit, match="no GPU"):
            kernel_times.main()

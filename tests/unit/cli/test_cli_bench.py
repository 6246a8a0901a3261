"""`mii_serve bench`: flags, exit codes, files, and the packages it needs. What it measures is tested where it is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_results import RIGHT, WRONG, build
from patience import PATIENCE_S
from scripted_server import RunningServer
from unit.cli.conftest import Run


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--rate", "0"), "--rate: must be a finite number above 0"),
        (("--rate", "nan"), "--rate: must be a finite number above 0"),
        (("--rate", "inf"), "--rate: must be a finite number above 0"),
        (("--requests", "0"), "--requests: must be a finite number above 0"),
        (("--duration", "-1"), "--duration: must be a finite number above 0"),
        (("--timeout", "0"), "--timeout: must be a finite number above 0"),
        (("--max-in-flight", "0"), "--max-in-flight: must be"),
        (("--goodput", "0"), "--goodput: must be"),
        (("--warmup", "-1"), "--warmup: must be 0 or more"),
        (("--check", "-1"), "--check: must be 0 or more"),
        (("--rate", "1", "--concurrency", "2"), "--rate: cannot be combined with --concurrency"),
        (("--arrivals", "constant"), "--arrivals: needs --rate"),
        (("--trace-speed", "2"), "--trace-speed: needs --trace"),
        (("--trace", "nowhere.jsonl"), "--trace: cannot read nowhere.jsonl"),
        (("--mix", "steps=1"), "mix.steps: no such key"),
        (("--metrics", "ftp://a"), "target: must be http://HOST:PORT"),
        (("--output", "no/such/folder/a.json"), "--output: no such folder"),
        (("--protocol", "carrier-pigeon"), "--protocol: invalid choice"),
        (("compare", "a.json"), "the following arguments are required: FILE"),
        (("compare", "a.json", "b.json"), "a.json: is no result of mii_serve bench"),
    ],
)
def test_wrong_usage_is_exit_code_two_before_a_request_is_sent(run: Run, flags: tuple[str, ...], complaint: str) -> None:
    ran = run("bench", "--target", "127.0.0.1:1", *flags)
    assert (ran.code, ran.out) == (2, "")
    assert complaint in ran.err


@pytest.mark.parametrize("argv", [("bench", "--help"), ("bench", "compare", "--help")])
def test_help_tells_both_uses_and_the_exit_codes(run: Run, argv: tuple[str, ...]) -> None:
    ran = run(*argv)
    assert ran.code == 0
    assert "compare A.json B.json" in ran.out
    assert "exit codes:" in ran.out


@pytest.mark.parametrize("protocol", ["grpc", "http", "mii"])
def test_an_unreachable_server_is_exit_code_three(run: Run, protocol: str) -> None:
    ran = run("bench", "--target", "127.0.0.1:1", "--protocol", protocol)
    assert ran.code == 3
    assert "no answer from 127.0.0.1:1" in ran.err


def test_a_run_writes_its_result(run: Run, server: RunningServer) -> None:
    """The server is one whose model nobody has: its pictures stay unchecked, and that is said."""
    flags = ("--target", server.target, "--concurrency", "2", "--requests", "6", "--goodput", "5", "--warmup", "1")
    ran = run("bench", *flags, "-o", "a.json")
    assert (ran.code, ran.err) == (0, "")
    assert "6 in " in ran.out
    assert "NOT CHECKED: --check-model" in ran.out
    written = json.loads(Path("a.json").read_text())
    assert written["summary"]["codes"] == {"OK": 6}
    assert written["server"]["model"] == "scripted"
    assert len(written["requests"]) == 6
    assert written["about"]["versions"]["mii_serve"]
    assert json.loads(run("bench", *flags, "--json").out)["summary"]["num_ok"] == 6


def test_a_run_writes_its_page(run: Run, server: RunningServer) -> None:
    pytest.importorskip("matplotlib", reason="the page needs the extra bench")
    assert run("bench", "--target", server.target, "--requests", "3", "--html", "a.html").code == 0
    assert Path("a.html").read_text().startswith("<!DOCTYPE html>")


def test_not_one_answer_is_exit_code_one(run: Run, server: RunningServer) -> None:
    ran = run("bench", "--target", server.target, "--requests", "3", "--warmup", "0", "--mix", "height=3000000000, width=8")
    assert ran.code == 1
    assert "error: no request succeeded" in ran.err
    assert "INVALID_ARGUMENT" in ran.out


def test_compare_is_a_table_or_json_and_a_rejected_run_is_exit_code_five(run: Run) -> None:
    for name, check in (("a.json", RIGHT), ("b.json", WRONG)):
        Path(name).write_text(build(check).to_json())
    ran = run("bench", "compare", "a.json", "a.json")
    assert ran.code == 0
    assert "no difference shown" in ran.out
    ran = run("bench", "compare", "a.json", "b.json", "--json")
    assert ran.code == 5
    assert json.loads(ran.out)["rejected"] == ["second"]


WITHOUT_EXTRAS = """
import sys

EXTRAS = {"torch", "numpy", "pydantic", "pydantic_settings", "yaml", "prometheus_client", "httpx2", "matplotlib", "scipy"}


class BaseOnly:
    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            return None
        return next((spec for one in self.finders if (spec := one.find_spec(name, path, target))), None)


sys.meta_path[:] = [BaseOnly(sys.meta_path[:])]
from mii_serve.cli import main

main(sys.argv[1:])
"""


def run_without_extras(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_EXTRAS, "bench", *argv]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_a_grpc_server_is_measured_with_the_base_installation(tmp_path: Path, server: RunningServer) -> None:
    flags = ("--requests", "12", "--mix", "1: num_inference_steps=1", "--check-model", "demo", "-o", "a.json")
    ran = run_without_extras(tmp_path, "--target", server.target, *flags)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "12 in " in ran.stdout
    assert "they need numpy" in ran.stdout
    assert "NOT CHECKED: the reference engine needs torch, which the extra 'server' installs" in " ".join(ran.stdout.split())
    assert json.loads((tmp_path / "a.json").read_text())["summary"]["codes"] == {"OK": 12}


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--html", "a.html"), "--html: needs the package matplotlib; install mii_serve with the extra 'bench'"),
        (("--metrics", "127.0.0.1:1"), "--metrics: needs the package httpx2; install mii_serve with the extra 'bench'"),
        (("--protocol", "http"), "--protocol http: needs the package httpx2; install mii_serve with the extra 'bench'"),
        (("--mix", "a.yaml"), "--mix: needs the package yaml; install mii_serve with the extra 'bench'"),
        (("compare", "a.json", "a.json"), "compare: needs the package numpy; install mii_serve with the extra 'bench'"),
    ],
)
def test_a_flag_that_needs_more_names_the_extra_before_the_load(tmp_path: Path, flags: tuple[str, ...], complaint: str) -> None:
    (tmp_path / "a.json").write_text(build(RIGHT).to_json())
    ran = run_without_extras(tmp_path, *flags)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert complaint in ran.stderr

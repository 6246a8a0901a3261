"""`mii_serve bench`: flags, exit codes, files. What it measures is tested where it is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripted_server import RunningServer
from unit.bench.test_bench_report import RIGHT, WRONG, made
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
        (("--rate", "1", "--concurrency", "2"), "--rate: cannot go with --concurrency"),
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
def test_wrong_usage_is_exit_code_two_before_anybody_is_asked(run: Run, flags: tuple[str, ...], complaint: str) -> None:
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
def test_nobody_there_is_exit_code_three(run: Run, protocol: str) -> None:
    ran = run("bench", "--target", "127.0.0.1:1", "--protocol", protocol)
    assert ran.code == 3
    assert "no answer from 127.0.0.1:1" in ran.err


def test_a_run_writes_its_result_and_its_page(run: Run, server: RunningServer) -> None:
    """The server is one whose model nobody has: its pictures stay unchecked, and that is said."""
    flags = ("--target", server.target, "--concurrency", "2", "--requests", "6", "--goodput", "5", "--warmup", "1")
    ran = run("bench", *flags, "-o", "a.json", "--html", "a.html")
    assert (ran.code, ran.err) == (0, "")
    assert "6 in " in ran.out
    assert "NOT CHECKED: --check-model" in ran.out
    written = json.loads(Path("a.json").read_text())
    assert written["summary"]["codes"] == {"OK": 6}
    assert written["server"]["model"] == "scripted"
    assert len(written["requests"]) == 6
    assert written["about"]["versions"]["mii_serve"]
    assert Path("a.html").read_text().startswith("<!DOCTYPE html>")
    assert json.loads(run("bench", *flags, "--json").out)["summary"]["num_ok"] == 6


def test_not_one_answer_is_exit_code_one(run: Run, server: RunningServer) -> None:
    ran = run("bench", "--target", server.target, "--requests", "3", "--warmup", "0", "--mix", "height=3000000000, width=8")
    assert ran.code == 1
    assert "error: no request went well" in ran.err
    assert "INVALID_ARGUMENT" in ran.out


def test_compare_is_a_table_or_json_and_a_rejected_run_is_exit_code_five(run: Run) -> None:
    for name, verdict in (("a.json", RIGHT), ("b.json", WRONG)):
        Path(name).write_text(made(verdict).to_json())
    ran = run("bench", "compare", "a.json", "a.json")
    assert ran.code == 0
    assert "no difference shown" in ran.out
    ran = run("bench", "compare", "a.json", "b.json", "--json")
    assert ran.code == 5
    assert json.loads(ran.out)["rejected"] == ["second"]

"""`mii_serve bench`: flags, exit codes, files, and the packages it needs. What it measures is tested where it is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_results import RIGHT, WRONG, build
from commands import Run


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


def test_compare_is_a_table_or_json_and_a_rejected_run_is_exit_code_five(run: Run) -> None:
    for name, check in (("a.json", RIGHT), ("b.json", WRONG)):
        Path(name).write_text(build(check).to_json())
    ran = run("bench", "compare", "a.json", "a.json")
    assert ran.code == 0
    assert "no difference shown" in ran.out
    ran = run("bench", "compare", "a.json", "b.json", "--json")
    assert ran.code == 5
    assert json.loads(ran.out)["rejected"] == ["second"]

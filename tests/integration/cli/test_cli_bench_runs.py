"""`mii_serve bench` against a scripted server, and against none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import Run
from scripted_server import RunningServer


@pytest.mark.parametrize("protocol", ["grpc", "http", "mii"])
def test_an_unreachable_server_is_exit_code_three(run: Run, protocol: str) -> None:
    ran = run("bench", "--target", "127.0.0.1:1", "--protocol", protocol)
    assert ran.code == 3
    assert "no answer from 127.0.0.1:1" in ran.err


def test_a_run_writes_its_result(run: Run, server: RunningServer) -> None:
    """Its model is not to be had: its pictures stay unchecked, and the report says so."""
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

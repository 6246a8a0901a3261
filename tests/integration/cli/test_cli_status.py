"""`mii_serve status`."""

from __future__ import annotations

import json

import pytest
from commands import Run
from scripted_server import RunningServer

from mii_serve.errors import EngineError


def test_a_serving_server_is_described(run: Run, server: RunningServer) -> None:
    ran = run("status", "--target", server.target)
    assert (ran.code, ran.err) == (0, "")
    for text in ("SERVING", server.target, "scripted r1", "reference fp32 on cpu", "3 of 8 in use", "0:01:01", "ddim"):
        assert text in ran.out
    assert "\x1b" not in ran.out


def test_json_is_one_object(run: Run, server: RunningServer) -> None:
    answer = json.loads(run("status", "--target", server.target, "--json").out)
    assert (answer["target"], answer["health"], answer["info"]["model"]) == (server.target, "SERVING", "scripted")
    assert answer["info"]["activity"]["max_slots"] == 8


def test_a_server_that_is_not_ready_is_exit_code_three(run: Run, server: RunningServer) -> None:
    server.set_serving(False)
    ran = run("status", "--target", server.target)
    assert ran.code == 3
    assert "NOT_SERVING" in ran.out
    assert ran.err == f"error: {server.target} is not ready: its health is NOT_SERVING\n"


def test_an_unreachable_server_is_exit_code_three(run: Run) -> None:
    ran = run("status", "--target", "127.0.0.1:1")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith("error: no answer from 127.0.0.1:1")
    ran = run("status", "--target", "127.0.0.1:1", "--json")
    assert ran.code == 3
    assert json.loads(ran.out) == {"target": "127.0.0.1:1", "health": "UNREACHABLE", "info": None}


@pytest.mark.parametrize("is_serving", [True, False])
def test_a_server_without_information_still_has_its_health(run: Run, server: RunningServer, is_serving: bool) -> None:
    server.servicer.info_error = EngineError("odd")
    server.set_serving(is_serving)
    ran = run("status", "--target", server.target)
    assert ran.code == (1 if is_serving else 3)
    assert "SERVING" in ran.out
    assert "error: odd" in ran.err

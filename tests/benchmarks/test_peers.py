"""What `benchmarks/peers.py` counts, and that a system which is not installed is a row with the reason."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import peers
import pytest
from patience import PATIENCE_S

from mii_serve.bench.values import Record


def ended(at_s: float, code: str = "OK") -> Record:
    return Record(index=0, kind="k", num_images=1, intended_s=0, sent_s=0, ended_s=at_s, code=code)


def test_the_steady_rate_leaves_out_the_start_and_the_end():
    """A server that does four a second; nothing ends in the first moments, and the last callers have no successors."""
    records = [ended(0.25 * (i + 1)) for i in range(48)] + [ended(5.0, "UNAVAILABLE")]
    rate, counted = peers.steady(records, 8.0)
    assert rate == pytest.approx(4.0)
    assert [record.ended_s for record in counted] == pytest.approx([0.25 * (i + 1) for i in range(24)])


def test_of_a_server_slower_than_the_run_all_counts():
    assert peers.steady([ended(20.0), ended(40.0), ended(40.0, "DEADLINE_EXCEEDED")], 8.0)[0] == pytest.approx(2 / 40)
    assert peers.steady([], 8.0) == (0.0, [])


def test_every_system_can_be_started_and_spoken_to():
    for system in peers.SYSTEMS.values():
        assert "PORT" in system.command
        assert system.wire in ("grpc", "http", "mii")
        script = next((part for part in system.command if part.endswith(".py")), None)
        assert script is None or Path(script).is_file()


def test_a_peer_that_is_not_installed_is_a_row_that_says_so(tmp_path, monkeypatch):
    out = tmp_path / "peers.json"
    missing = replace(peers.SYSTEMS["litserve"], command=("/nowhere/python", "FOLDER", "PORT"))
    monkeypatch.setitem(peers.SYSTEMS, "litserve", missing)
    monkeypatch.setattr("sys.argv", ["peers.py", "--systems", "litserve", "--seconds", "1", "--out", str(out)])
    peers.main()
    written = json.loads(out.read_text())
    assert written["rows"] == [{"system": "litserve", "skipped": "/nowhere/python is missing: make peers installs it"}]
    assert {"commit", "date", "device", "versions", "command", "peer_versions"} <= set(written)


@pytest.mark.parametrize(
    ("code", "timeout_s", "why"),
    [
        ('print("out of luck"); exit(3)', PATIENCE_S, "it ended with 3: out of luck"),
        ("import time; time.sleep(3600)", 1.5, "no answer within 1.5 s"),
    ],
)
async def test_a_server_that_does_not_come_up_is_given_up_and_ended(code, timeout_s, why):
    plan = peers.Plan(loop=peers.Loop(kind="closed", callers=1), mix=peers.parse_mix(None), limits=peers.LoadLimits())
    system = peers.System("s", "http", (sys.executable, "-c", code), "")
    server, driver = peers.Server(system), None
    try:
        driver = system.driver(server.port)
        with pytest.raises(peers.DownError, match=why):
            await server.ready(driver, plan, timeout_s)
    finally:
        server.stop()
        await driver.close()
    assert server._process.returncode is not None

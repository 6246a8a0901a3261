"""The unit of systemd, as systemd reads it."""

from __future__ import annotations

import configparser
import re

import pytest
from deployment_tools import ROOT, run, tool

UNIT = ROOT / "deployment" / "systemd" / "mii_serve.service"
MOST_EXPOSED = 2.5
"""Of systemd's own measure, from 0 (locked away) to 10; most services of a distribution have 9."""


@pytest.fixture
def on_this_machine(tmp_path):
    """The unit with a program that exists; systemd checks that."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/mii_serve/bin/mii_serve", tool("true")))
    return unit


def test_systemd_finds_nothing_wrong(on_this_machine):
    ended = run("systemd-analyze", "verify", on_this_machine)
    complaints = [line for line in (ended.stdout + ended.stderr).splitlines() if "mii_serve.service" in line]
    assert ended.returncode == 0 and complaints == []


def test_systemd_finds_it_little_exposed(on_this_machine):
    ended = run("systemd-analyze", "security", "--offline=true", on_this_machine)
    (level,) = re.findall(r"Overall exposure level for mii_serve.service: ([\d.]+)", ended.stdout)
    assert float(level) <= MOST_EXPOSED


def test_the_service_has_the_time_of_its_drain():
    service = configparser.ConfigParser(strict=False, interpolation=None)
    service.optionxform = str  # type: ignore[assignment, method-assign]
    service.read(UNIT)
    assert service["Service"].getint("TimeoutStopSec") >= 30 + 20
    assert service["Service"]["KillMode"] == "mixed"  # only the front is asked to end; it drains, and ends its replicas

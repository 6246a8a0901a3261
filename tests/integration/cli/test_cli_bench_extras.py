"""`mii_serve bench` on the base installation: what works there, and which extra the rest needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_results import RIGHT, build
from patience import PATIENCE_S
from scripted_server import RunningServer

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
    assert "NOT CHECKED: torch is not installed: install mii_serve with the extra server" in " ".join(ran.stdout.split())
    assert json.loads((tmp_path / "a.json").read_text())["summary"]["codes"] == {"OK": 12}


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--html", "a.html"), "matplotlib is not installed: install mii_serve with the extra bench"),
        (("--metrics", "127.0.0.1:1"), "httpx2 is not installed: install mii_serve with the extra bench"),
        (("--protocol", "http"), "httpx2 is not installed: install mii_serve with the extra bench"),
        (("--mix", "a.yaml"), "yaml is not installed: install mii_serve with the extra bench"),
        (("compare", "a.json", "a.json"), "numpy is not installed: install mii_serve with the extra bench"),
    ],
)
def test_a_flag_that_needs_more_names_the_extra_before_the_load(tmp_path: Path, flags: tuple[str, ...], complaint: str) -> None:
    (tmp_path / "a.json").write_text(build(RIGHT).to_json())
    ran = run_without_extras(tmp_path, *flags)
    assert (ran.returncode, ran.stdout) == (6, "")
    assert complaint in ran.stderr

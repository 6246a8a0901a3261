"""Other people's clients as they are installed by `make clients`, each run by a Python of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


def run_client(name: str, script: str, *arguments: str, env: dict[str, str] | None = None) -> str:
    """Run a script of tests/clients with the client environment `name` (tests/clients/NAME.txt); its standard output.

    The test fails with the script's standard error when the script does.
    """
    python = ROOT / ".clients" / name / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} is missing: run `make clients`")
    environment = {**os.environ, **(env or {})}
    environment.pop("PYTHONPATH", None)  # nothing of ours is to be importable there
    command = [str(python), str(ROOT / "tests" / "clients" / script), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)
    if ran.returncode != 0:
        pytest.fail(f"{script} ended with {ran.returncode}: {ran.stderr[-4000:]}")
    return ran.stdout

"""What OpenMP reads in a process that runs a command."""

from __future__ import annotations

import os
import subprocess
import sys

from patience import PATIENCE_S

from mii_serve.threads import SPIN_COUNT, WAIT_VARIABLES

LOADS_TORCH = """
from mii_serve.cli import command_line

def load_torch(values):
    import torch
    return 0

command_line._COMMANDS["status"] = load_torch
command_line.main(["status"])
"""


def what_the_runtime_reads(**settings: str) -> str:
    """OpenMP's own account of its settings, in a process that runs a command which loads torch."""
    bare = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES}
    environment = {**bare, "OMP_DISPLAY_ENV": "VERBOSE", **settings}
    command = [sys.executable, "-c", LOADS_TORCH]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    return ran.stderr


def test_a_commands_threads_spin_for_a_moment_only() -> None:
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in what_the_runtime_reads()


def test_the_operator_is_not_overruled() -> None:
    assert "GOMP_SPINCOUNT = '77'" in what_the_runtime_reads(GOMP_SPINCOUNT="77")

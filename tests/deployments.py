"""`mii_serve deploy` as its users start it: another process, real ports, the built-in model."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil
import pytest

START_TIMEOUT_S = 180.0
ENDLESS = {"num_inference_steps": 1000, "scheduler": "euler"}
"""Longer than any test waits, on a sampler that can make so many steps."""


@dataclass
class Deployment:
    process: subprocess.Popen[str]
    grpc: str
    http: str
    lines: list[str] = field(default_factory=list)

    def replica_pids(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


def start(*arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    ports = ("--grpc-port", "0", "--http-port", "0")
    command = [sys.executable, "-m", "mii_serve", "deploy", *arguments]
    if "--grpc-port" not in arguments:
        command += ports
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
    )


@contextlib.contextmanager
def deployed(*arguments: str, env: dict[str, str] | None = None) -> Iterator[Deployment]:
    with start(*arguments, env=env) as process:
        try:
            line = read_line(process, START_TIMEOUT_S)
            match = re.fullmatch(r"ready grpc=(\S+:\d+) http=(\S+:\d+)\n", line)
            assert match, f"not a ready line: {line!r}"
            yield Deployment(process, match[1], match[2])
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=30)


def read_line(process: subprocess.Popen[str], timeout_s: float) -> str:
    """The next line of stdout, or what is on stderr when there is none in time."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], timeout_s)
    if not ready:
        process.kill()
        pytest.fail(f"no line within {timeout_s} s; stderr: {process.communicate()[1]}")
    line = process.stdout.readline()
    if not line:
        pytest.fail(f"ended without a line; stderr: {process.communicate()[1]}")
    return line


def until(condition, what: str, timeout_s: float = 60.0) -> None:
    """Wait, within a bound, for another process to get somewhere."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still not so: {what}"
        time.sleep(0.02)

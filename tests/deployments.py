"""`mii_serve deploy` as its users start it: another process, real ports, the built-in model."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

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
    log: IO[str] | None = None

    def logged(self) -> str:
        """What its log says at the end."""
        assert self.log is not None
        return _end_of(self.log)

    def replica_pids(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


def start(
    *arguments: str,
    env: dict[str, str] | None = None,
    stderr: int | IO[str] = subprocess.PIPE,
    max_files: int | None = None,
) -> subprocess.Popen[str]:
    ports = ("--grpc-port", "0", "--http-port", "0")
    command = [sys.executable, "-m", "mii_serve", "deploy", *arguments]
    if "--grpc-port" not in arguments:
        command += ports
    if max_files is not None:
        command = ["sh", "-c", f'ulimit -n {max_files}; exec "$@"', "sh", *command]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, **(env or {})})


@contextlib.contextmanager
def deployed(*arguments: str, env: dict[str, str] | None = None, max_files: int | None = None) -> Iterator[Deployment]:
    """A deployment that is ready. Its log goes to a file: a pipe that nobody empties would be a fault of the test's own."""
    with tempfile.TemporaryFile("w+") as log, start(*arguments, env=env, stderr=log, max_files=max_files) as process:
        try:
            line = read_line(process, START_TIMEOUT_S, log)
            match = re.fullmatch(r"ready grpc=(\S+:\d+) http=(\S+:\d+)\n", line)
            assert match, f"not a ready line: {line!r}"
            yield Deployment(process, match[1], match[2], log=log)
        except BaseException:
            print(f"the deployment's log ends:\n{_end_of(log)}", file=sys.stderr)
            raise
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=30)


def read_line(process: subprocess.Popen[str], timeout_s: float, log: IO[str] | None = None) -> str:
    """The next line of stdout. There being none in time fails the test, with what the process has logged."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], timeout_s)
    line = process.stdout.readline() if ready else ""
    if not line:
        process.kill()
        said = process.communicate()[1] or "" if log is None else _end_of(log)
        pytest.fail(f"no line within {timeout_s} s; stderr: {said}")
    return line


def _end_of(log: IO[str]) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - 10_000))
    return log.read()


def until(condition, what: str, timeout_s: float = 60.0) -> None:
    """Wait, within a bound, for another process to get somewhere."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still not so: {what}"
        time.sleep(0.02)

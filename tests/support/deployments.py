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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil
import pytest
from patience import PATIENCE_S

from mii_serve.client import Client, ReplicaInfo
from mii_serve.errors import UnavailableError

IDLE_S = 120.0
"""A process that for so long neither computes nor writes a line is not going to."""
WITH_SPARE = {"MII_SERVE_ENABLE_SPARE_PROCESS": "1"}
WITHOUT_SPARE = {"MII_SERVE_ENABLE_SPARE_PROCESS": "0"}
MODELLESS = (str(Path(__file__).with_name("modelless")), str(Path(__file__).parent))
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
        """Those that have their orders; a spare waits for one."""
        return [child.pid for child in self._children() if not _is_spare(child)]

    def spare_pids(self) -> list[int]:
        return [child.pid for child in self._children() if _is_spare(child)]

    def _children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


def _is_spare(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()[-1:] == ["spare"] and process.name() != "mii_replica"
    return False


def ready_replicas(client: Client) -> list[ReplicaInfo]:
    """As the server tells it; it refuses to where there is none at all."""
    with contextlib.suppress(UnavailableError):
        return [replica for replica in client.server_info().replicas if replica.is_ready]
    return []


def start(
    *arguments: str,
    env: dict[str, str] | None = None,
    stderr: int | IO[str] = subprocess.PIPE,
    max_files: int | None = None,
    has_model: bool = True,
) -> subprocess.Popen[str]:
    """Without a spare process, which would take a core from most tests and serve none, unless `env` asks for one.

    The number of slots is given: to look for it takes seconds that the machine has not, and finds another one each time.
    Without a model, the replicas are processes like any other, and their engine is a `TimedEngine`: for tests of processes,
    which see nothing of a picture and need not wait until torch is imported.
    """
    ports = ("--grpc-port", "0", "--http-port", "0")
    command = [sys.executable, "-m", "mii_serve", "deploy", *arguments]
    if "--grpc-port" not in arguments:
        command += ports
    patient = {"MII_SERVE_REPLICA_WAIT_S": str(PATIENCE_S), **WITHOUT_SPARE}
    if not {"--config", "reference"} & set(arguments):
        patient["MII_SERVE_MAX_SLOTS"] = "8"
    environment = {**os.environ, **patient, **(env or {})}
    if not has_model:
        environment = without_models(environment)
    if max_files is not None:
        command = ["sh", "-c", f'ulimit -n {max_files}; exec "$@"', "sh", *command]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)


def without_models(environment: Mapping[str, str]) -> dict[str, str]:
    """For a process whose replicas are to load no model, see `start`."""
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, (*MODELLESS, environment.get("PYTHONPATH"))))}


@contextlib.contextmanager
def deployed(
    *arguments: str, env: dict[str, str] | None = None, max_files: int | None = None, has_model: bool = True
) -> Iterator[Deployment]:
    """A deployment that is ready. Its log goes to a file: a pipe that nobody empties would be a fault of the test's own."""
    with (
        tempfile.TemporaryFile("w+") as log,
        start(*arguments, env=env, stderr=log, max_files=max_files, has_model=has_model) as process,
    ):
        try:
            line = read_line(process, log)
            match = re.fullmatch(r"ready grpc=(\S+:\d+) http=(\S+:\d+)\n", line)
            assert match, f"not a ready line: {line!r}"
            yield Deployment(process, match[1], match[2], log=log)
        except BaseException:
            print(f"the deployment's log ends:\n{_end_of(log)}", file=sys.stderr)
            raise
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=PATIENCE_S)


def read_line(process: subprocess.Popen[str], log: IO[str] | None = None) -> str:
    """The next line of stdout, waited for as long as the process gets on. None coming fails the test, with what was logged."""
    assert process.stdout is not None
    progress = Progress(process.pid)
    while not (ready := select.select([process.stdout], [], [], 1.0)[0]) and not progress.has_ended():
        pass
    line = process.stdout.readline() if ready else ""
    if not line:
        _kill_tree(process)
        said = process.communicate()[1] or "" if log is None else _end_of(log)
        pytest.fail(f"no line, {progress}; stderr: {said}")
    return line


def finished(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Wait, for as long as the process gets on, for its end; what it wrote to stdout and stderr."""
    progress = Progress(process.pid)
    while True:
        try:
            return process.communicate(timeout=1.0)
        except subprocess.TimeoutExpired:
            if progress.has_ended():
                _kill_tree(process)
                out, err = process.communicate()
                pytest.fail(f"it does not end, {progress}; stdout: {out}; stderr: {err}")


class Progress:
    """Whether a process and its children get on: how much they have computed. A slow machine is not told from a fast one."""

    def __init__(self, pid: int) -> None:
        self._pid, self._used, self._since = pid, -1.0, time.monotonic()

    def __str__(self) -> str:
        return f"{self._used:.1f} s of CPU time used, none in the last {time.monotonic() - self._since:.0f} s"

    def has_ended(self) -> bool:
        used = _cpu_seconds(self._pid)
        if used >= self._used + 0.1:
            self._used, self._since = used, time.monotonic()
        return time.monotonic() - self._since > IDLE_S


def _cpu_seconds(pid: int) -> float:
    seconds = 0.0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def _kill_tree(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()


def _end_of(log: IO[str]) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - 10_000))
    return log.read()


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for another process to get somewhere."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"still not so: {what}"
        time.sleep(0.02)

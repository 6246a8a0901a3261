"""Deployments that `mii_serve.compat.mii.deploy` has started, by name, until they end. For one user of one machine.

They are kept in a folder that only this user can enter: `MII_SERVE_RUNTIME_DIR`, else `mii_serve` in `XDG_RUNTIME_DIR`, else
`mii_serve-UID` in the folder for temporary files. A process is known by its number, its start and the machine's boot, so that
another one that later has the number is never taken for it, nor stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from mii_serve.errors import ConfigError, UnavailableError

RUNTIME_DIR_VARIABLE = "MII_SERVE_RUNTIME_DIR"
READY = re.compile(r"ready grpc=(\S+) http=(\S+)\n")
_KILL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """The process of a deployment, and what must be known to call it and to wait for its end."""

    pid: int
    birth: str
    is_tls: bool
    drain_timeout_s: float

    @classmethod
    def of(cls, pid: int, *, is_tls: bool, drain_timeout_s: float) -> Process:
        return cls(pid=pid, birth=_birth(pid) or "", is_tls=is_tls, drain_timeout_s=drain_timeout_s)

    def is_alive(self) -> bool:
        with contextlib.suppress(ProcessLookupError), self._opened() as handle:
            return not _has_ended(handle, 0.0)
        return False

    def stop(self) -> bool:
        """End it as SIGTERM does, after its drain; at the last by force. False when it had ended already."""
        try:
            with self._opened() as handle:
                if _has_ended(handle, 0.0):
                    return False
                signal.pidfd_send_signal(handle, signal.SIGTERM)
                if not _has_ended(handle, self.drain_timeout_s + _KILL_TIMEOUT_S):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                    _has_ended(handle, _KILL_TIMEOUT_S)
        except ProcessLookupError:
            return False
        return True

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """A handle of this very process.

        Raises:
            ProcessLookupError: it is gone, even if another process has its number now.
        """
        handle = os.pidfd_open(self.pid)
        try:
            if _birth(self.pid) != self.birth:
                raise ProcessLookupError
            yield handle
        finally:
            os.close(handle)


class Entry:
    """One name's place in the registry."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        """Look at the place, whether or not something is there.

        Raises:
            ConfigError: the folder belongs to another user, or others may enter it.
        """
        self.name = name
        self.folder = _private(folder or _default_folder()) / f"deployment-{quote(name, safe='')}"
        self.settings, self.log, self.stdout = (self.folder / file for file in ("settings.json", "log", "stdout"))
        self._process = self.folder / "process.json"

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Hold the name while its deployment starts.

        Raises:
            ConfigError: it runs already, or another process is starting it.
        """
        self.folder.mkdir(mode=0o700, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError("deployment_name", f"{self.name!r} is being started by another process") from None
            process = self.process()
            if process is not None and process.is_alive():
                raise ConfigError(
                    "deployment_name", f"{self.name!r} runs already, as process {process.pid}; terminate it first"
                )
            self.forget()
            yield

    def note(self, process: Process) -> None:
        """Write down which process it is: at once or not at all, whatever happens to us."""
        written = self._process.with_suffix(".new")
        written.write_text(json.dumps(asdict(process)))
        written.replace(self._process)

    def forget(self) -> None:
        for file in (self._process, self.stdout):
            file.unlink(missing_ok=True)

    def process(self) -> Process | None:
        """Which process it is or was."""
        try:
            return Process(**json.loads(self._process.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def address(self) -> str | None:
        """Where it listens, once it is ready."""
        with contextlib.suppress(OSError):
            if match := READY.search(self.stdout.read_text()):
                return match[1]
        return None

    def running(self) -> tuple[Process, str]:
        """The living process and its address.

        Raises:
            UnavailableError: there is none, or it is not ready yet.
        """
        process = self.process()
        if process is None or not process.is_alive():
            raise UnavailableError(f"no deployment {self.name!r} of this user runs on this machine")
        if (address := self.address()) is None:
            raise UnavailableError(f"the deployment {self.name!r} is still starting")
        return process, address


def _default_folder() -> Path:
    if named := os.environ.get(RUNTIME_DIR_VARIABLE):
        return Path(named)
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(session) / "mii_serve"
    return Path(tempfile.gettempdir()) / f"mii_serve-{os.getuid()}"


def _private(folder: Path) -> Path:
    """The folder, made if need be. In a folder that all can write to, another user may have been there before us."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(RUNTIME_DIR_VARIABLE, f"cannot use {folder}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            RUNTIME_DIR_VARIABLE, f"{folder} must be a folder of this user that no other user can enter (chmod 700)"
        )
    return folder


def _birth(pid: int) -> str | None:
    """The machine's boot and the moment after it at which the process started; None where it is gone."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The name in parentheses may hold spaces and parentheses itself; the start is the 20th field after it.
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
    return f"{boot} {started}"


def _has_ended(handle: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    deadline = time.monotonic() + timeout_s
    while True:
        left_ms = max(0.0, deadline - time.monotonic()) * 1000
        if poll.poll(left_ms):
            return True
        if time.monotonic() >= deadline:
            return False

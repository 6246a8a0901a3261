"""Keeps one replica process alive: starts it, learns when it is ready, notices its end, starts it again.

The replica dies with its parent: its stdin is a pipe that only this process holds, and that closes with it, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

from mii_serve import errors
from mii_serve.config import DeployConfig
from mii_serve.errors import EngineError, MiiServeError, UnavailableError

logger = logging.getLogger(__name__)

BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STEADY_S = 60.0
"""A replica that lived this long starts its next life without extra delay."""


class ReplicaSupervisor:
    """Owns the replica's process and socket. One task runs `run`; others read `is_ready` and `socket`."""

    def __init__(self, config: DeployConfig) -> None:
        self._config = config
        self._folder = tempfile.TemporaryDirectory(prefix="mii_serve-")  # mode 0700: the socket is private
        self._ready = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self.num_restarts = 0

    @property
    def socket(self) -> Path:
        return Path(self._folder.name) / "replica-0.sock"

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def run(self, on_change: asyncio.Event) -> None:
        """Keep a replica running until cancelled; `on_change` is set whenever readiness changes.

        Raises:
            ModelError, ConfigError, EngineError: the first start failed; a later one is retried.
        """
        failures = 0
        try:
            while True:
                born, was_ready = time.monotonic(), False
                try:
                    await self._start()
                    was_ready = True
                    self._ready.set()
                    on_change.set()
                    await self._ended()
                except MiiServeError as error:
                    if not was_ready and self.num_restarts == 0:
                        raise
                    logger.error("the replica is gone: %s", error)
                finally:
                    self._ready.clear()
                    on_change.set()
                failures = 0 if was_ready and time.monotonic() - born > STEADY_S else failures + 1
                delay = BACKOFF_S[min(failures, len(BACKOFF_S)) - 1] if failures else 0.0
                self.num_restarts += 1
                logger.warning("restarting the replica in %.1f s", delay)
                await asyncio.sleep(delay)
        finally:
            await self._stop()
            self._folder.cleanup()

    async def _start(self) -> None:
        self.socket.unlink(missing_ok=True)
        read_fd, write_fd = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "mii_serve.replica.process",
                str(write_fd),
                stdin=asyncio.subprocess.PIPE,
                stdout=sys.stderr,  # our stdout belongs to the ready line
                pass_fds=(write_fd,),
            )
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        stdin = self._process.stdin
        assert stdin is not None
        level = logging.getLevelName(logging.getLogger().getEffectiveLevel())
        order = {"config": self._config.to_json(), "socket": str(self.socket), "log_level": level}
        with contextlib.suppress(ConnectionError):  # a child that is gone already says so on the status pipe
            stdin.write(json.dumps(order).encode() + b"\n")
            await stdin.drain()
        await self._await_ready(read_fd)

    async def _await_ready(self, status_fd: int) -> None:
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        pipe = os.fdopen(status_fd, "rb", buffering=0)
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            async with asyncio.timeout(self._config.startup_timeout_s):
                line = await reader.readline()
        except TimeoutError:
            await self._stop()
            raise EngineError(f"the replica was not ready within {self._config.startup_timeout_s:g} s") from None
        finally:
            transport.close()
        if not line:
            raise EngineError(f"the replica ended while starting, {await self._exit_reason()}")
        status = json.loads(line)
        if status["state"] == "failed":
            await self._stop()
            raise _rebuilt(status["error"], status["message"])

    async def _ended(self) -> None:
        raise UnavailableError(f"the replica ended, {await self._exit_reason()}")

    async def _exit_reason(self) -> str:
        assert self._process is not None
        code = await self._process.wait()
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(5.0):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _rebuilt(class_name: str, message: str) -> MiiServeError:
    """The error the replica raised, as nearly as its message allows."""
    if class_name == "ConfigError":
        setting, _, rule = message.partition(": ")
        return errors.ConfigError(setting, rule)
    if class_name == "ModelError":
        return errors.ModelError(message)
    return EngineError(message)

"""Keeps one replica process alive: starts it, learns when it is ready, notices its end or its hanging, starts it again.

The replica dies with its parent: its stdin is a pipe that only this process holds, and that closes with it, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from mii_serve import errors
from mii_serve.config import ENV_PREFIX, DeployConfig
from mii_serve.errors import EngineError, MiiServeError
from mii_serve.logs import current_format
from mii_serve.safe_path import safe_environment
from mii_serve.server.replica_client import Loss, ReplicaAddress
from mii_serve.server.sockets import new_socket_folder
from mii_serve.server.spare import Spares
from mii_serve.server.watch import until_hung

logger = logging.getLogger(__name__)

BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
MAX_STATUS_BYTES = 1024 * 1024
"""Of the line in which a replica says why it did not start; what a compiler says may be long."""
STEADY_S = 60.0
"""A replica that lived this long starts its next life without extra delay."""


class ReplicaSupervisor:
    """Owns the replica's process and socket. One task runs `run`; others read `is_ready` and `socket`."""

    def __init__(
        self,
        config: DeployConfig,
        *,
        index: int = 0,
        environment: Mapping[str, str] | None = None,
        spares: Spares | None = None,
    ) -> None:
        """`environment` is added to this process's own for the replica: which devices are its. `spares` have another owner."""
        self.index = index
        self._config = config
        self._environment = replica_environment(environment or {})
        self._spares = spares or Spares(is_on=False)
        self._folder = new_socket_folder(_socket_name(index))
        self._loss = Loss(reason="it has not started", is_crash=False)
        self._ready = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self.num_restarts = 0
        self._is_reload_due = False

    @property
    def socket(self) -> Path:
        return Path(self._folder.name) / _socket_name(self.index)

    @property
    def address(self) -> ReplicaAddress:
        return ReplicaAddress.socket(self.socket)

    @property
    def loss(self) -> Loss:
        """How the replica ended last."""
        return self._loss

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def prepare_spare(self) -> None:
        """To be called when nothing is waited for: a spare's start takes some seconds of a core."""
        self._spares.prepare(self._environment)

    def reload(self) -> None:
        """Let the replica read the files again that it signs pictures with; one that is starting does so when it is ready."""
        self._is_reload_due = True
        if self.is_ready:
            self._send_reload()

    def _send_reload(self) -> None:
        if self._is_reload_due and self._process is not None:
            self._is_reload_due = False
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGHUP)

    async def run(self, on_change: asyncio.Event) -> None:
        """Keep a replica running until cancelled; `on_change` is set whenever readiness changes.

        Raises:
            ModelError, ConfigError, VerificationError, EngineError: the first start failed; a later one is retried.
        """
        failures = 0
        try:
            while True:
                born, was_ready = time.monotonic(), False
                try:
                    await self._start()
                    was_ready = True
                    self._ready.set()
                    self._send_reload()
                    on_change.set()
                    self._loss = await self._ended()
                    logger.error("replica %d is gone: %s", self.index, self._loss.reason)
                except (MiiServeError, OSError) as error:  # the latter: no file or no memory left for a child
                    if self.num_restarts == 0:
                        raise (
                            error if isinstance(error, MiiServeError) else EngineError(f"no replica starts: {error}")
                        ) from None
                    self._loss = Loss(reason=str(error), is_crash=True)
                    logger.error("replica %d did not start: %s", self.index, error)
                finally:
                    self._ready.clear()
                    on_change.set()
                failures = 0 if was_ready and time.monotonic() - born > STEADY_S else failures + 1
                delay = BACKOFF_S[min(failures, len(BACKOFF_S)) - 1] if failures else 0.0
                self.num_restarts += 1
                logger.warning("restarting replica %d in %.1f s", self.index, delay)
                await asyncio.sleep(delay)
        finally:
            await self._stop()
            self._folder.cleanup()

    async def _start(self) -> None:
        self._make_room_for_socket()
        child = await self._spares.take(self._environment)
        self._process = child.process
        stdin = self._process.stdin
        assert stdin is not None
        level = logging.getLevelName(logging.getLogger().getEffectiveLevel())
        order = {
            "config": self._config.to_json(),
            "socket": str(self.socket),
            "log_level": level,
            "log_format": current_format(),
        }
        with contextlib.suppress(ConnectionError):  # a child that is gone already says so on the status pipe
            stdin.write(json.dumps(order).encode() + b"\n")
            await stdin.drain()
        await self._await_ready(child.status_fd)

    def _make_room_for_socket(self) -> None:
        if Path(self._folder.name).is_dir():
            self.socket.unlink(missing_ok=True)
        else:  # a cleaner of temporary files has been here
            self._folder.cleanup()
            self._folder = new_socket_folder(_socket_name(self.index))

    async def _await_ready(self, status_fd: int) -> None:
        reader = asyncio.StreamReader(limit=MAX_STATUS_BYTES)
        loop = asyncio.get_running_loop()
        pipe = os.fdopen(status_fd, "rb", buffering=0)
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            async with asyncio.timeout(self._config.startup_timeout_s):
                line = await reader.readline()
        except TimeoutError:
            await self._stop()
            raise EngineError(f"the replica was not ready within {self._config.startup_timeout_s:g} s") from None
        except ValueError:
            await self._stop()
            raise EngineError("the replica did not start, and its reason is too long to be read") from None
        finally:
            transport.close()
        if not line.endswith(b"\n"):  # it may have ended in the middle
            raise EngineError(f"the replica ended while starting, {await self._exit_reason()}")
        status = json.loads(line)
        if status["state"] == "failed":
            await self._stop()
            raise _rebuilt(status["error"], status["message"])

    async def _ended(self) -> Loss:
        """Wait for the end of the process, and bring it about when it hangs."""
        assert self._process is not None
        ending = asyncio.create_task(self._process.wait())
        hanging = asyncio.create_task(until_hung(self.address, self._config.hang_timeout_s))
        try:
            await asyncio.wait((ending, hanging), return_when=asyncio.FIRST_COMPLETED)
            if hanging.done() and not ending.done():
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await ending
                return Loss(reason=f"it hung: {hanging.result()}", is_crash=True)
        finally:
            ending.cancel()
            hanging.cancel()
            await asyncio.gather(ending, hanging, return_exceptions=True)
        was_killed = self._process.returncode in (-signal.SIGKILL, -signal.SIGTERM, 0)
        return Loss(reason=f"it ended, {await self._exit_reason()}", is_crash=not was_killed)

    async def _exit_reason(self) -> str:
        assert self._process is not None
        code = await self._process.wait()
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    async def kill(self) -> None:
        """End the replica at once, whatever it is doing. The way to end it in good order is to cancel `run`."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        self._folder.cleanup()

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


def replica_environment(added: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what is about content safety: replicas moderate nothing and need not know the key.

    And with a safe import path: the folder that the server was started in may be a model's.
    """
    own = os.environ.items()
    kept = {name: value for name, value in own if not name.upper().removeprefix(ENV_PREFIX).startswith("CONTENT_SAFETY")}
    return safe_environment({**kept, **added})


def _socket_name(index: int) -> str:
    return f"replica-{index}.sock"


def _rebuilt(class_name: str, message: str) -> MiiServeError:
    """The error the replica raised, as nearly as its message allows."""
    if class_name in ("ConfigError", "UnusableEngineError"):
        setting, _, rule = message.partition(": ")
        return errors.ConfigError(setting, rule) if class_name == "ConfigError" else errors.UnusableEngineError(rule)
    if class_name == "ModelError":
        return errors.ModelError(message)
    if class_name == "VerificationError":
        return errors.VerificationError(message)
    return EngineError(message)

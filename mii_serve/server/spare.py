"""Replica processes: started when they are needed, or before, so that the place of a lost one is taken in a moment.

Most of a replica's start is imports. A spare has made them and waits for its order: it has read no model, holds no memory of a
GPU, and costs some 270 MiB of the machine's. There is one for each environment that replicas have, because CUDA reads from a
process's environment, once, which devices are its own. Like a replica it ends with its parent, whose pipe it reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

MODULE = "mii_serve.replica.process"
SPARE = "spare"
"""The argument by which a process that has no order yet is known in a list of processes."""

Environment = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A replica process without its order, and where it will say what became of it. Who has it closes `status_fd`."""

    process: asyncio.subprocess.Process
    status_fd: int

    @property
    def is_alive(self) -> bool:
        return self.process.returncode is None


async def spawn(environment: Mapping[str, str], *arguments: str) -> Child:
    read_fd, write_fd = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            MODULE,
            str(write_fd),
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=sys.stderr,  # our stdout belongs to the ready line
            pass_fds=(write_fd,),
            env=dict(environment),
            process_group=0,  # Ctrl-C in a terminal is for us; what becomes of the replica we say
        )
    except BaseException:
        os.close(read_fd)
        raise
    finally:
        os.close(write_fd)
    return Child(process=process, status_fd=read_fd)


class Spares:
    """Owns the processes that wait for an order. Belongs to one event loop."""

    def __init__(self, *, is_on: bool) -> None:
        self._is_on = is_on
        self._spares: dict[Environment, asyncio.Task[Child]] = {}

    def prepare(self, environment: Mapping[str, str]) -> None:
        """See to it that there is a spare for this environment, if there are to be any."""
        key = frozenset(environment.items())
        if self._is_on and not _is_usable(self._spares.get(key)):
            self._drop(key)
            self._spares[key] = asyncio.create_task(spawn(environment, SPARE))

    async def take(self, environment: Mapping[str, str]) -> Child:
        """The spare for this environment; where there is none, or it has died, a process started now."""
        spare = self._spares.pop(frozenset(environment.items()), None)
        if spare is not None:
            with contextlib.suppress(OSError):  # it could not be started
                child = await spare
                if child.is_alive:
                    return child
                os.close(child.status_fd)
        return await spawn(environment)

    async def close(self) -> None:
        """End all that were not taken."""
        self._is_on = False
        while self._spares:
            _, spare = self._spares.popitem()
            with contextlib.suppress(OSError):
                child = await spare
                os.close(child.status_fd)
                with contextlib.suppress(ProcessLookupError):
                    child.process.kill()
                await child.process.wait()

    def _drop(self, key: Environment) -> None:
        spare = self._spares.pop(key, None)
        if spare is not None and spare.exception() is None:
            os.close(spare.result().status_fd)


def _is_usable(spare: asyncio.Task[Child] | None) -> bool:
    if spare is None or not spare.done():
        return spare is not None
    return spare.exception() is None and spare.result().is_alive

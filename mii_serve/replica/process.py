"""Entry point of a replica process: `python -m mii_serve.replica.process STATUS_FD`.

The process imports what it will need and then waits for its order; until that comes it is a spare. The parent writes one JSON
line to stdin, `{"config": …, "socket": …}`, and keeps the pipe open: when it closes, the parent is gone and so is this process.
On the descriptor STATUS_FD the replica writes JSON lines: `{"state": "ready"}` once a warm-up picture has been made and the
socket is open, or `{"state": "failed", "error": <class>, "message": …}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mii_serve.config import DeployConfig
from mii_serve.errors import MiiServeError
from mii_serve.logs import configure_logs
from mii_serve.models.deferred import import_for_drawing
from mii_serve.parent import end_with_parent
from mii_serve.provenance import Provenance
from mii_serve.replica.local import build_loop, build_warm_engine
from mii_serve.replica.loop import ReplicaLoop
from mii_serve.replica.service import ListenOn, replica_server
from mii_serve.threads import wait_briefly
from mii_serve.tracing import flush_traces, start_tracing

logger = logging.getLogger(__name__)

HEAVY_MODULES = ("mii_serve.engine.factory", "mii_serve.models.loading")
"""What loading any model imports. None of them touches a device."""


def main() -> int:
    # Ctrl-C in a terminal reaches the whole process group; only the parent acts on it, and then tells us by SIGTERM.
    # SIGHUP tells the parent to read its files again, and it passes that on where we have some; a terminal that goes away ends
    # the parent, and so us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=_end, name="end").start())
    end_with_parent()
    wait_briefly()
    _name_process("mii_spare" if sys.argv[2:] else "mii_replica")
    import_for_drawing(*HEAVY_MODULES)  # most of a start is this; a spare has it behind it
    if not (line := sys.stdin.readline()):
        return 1  # the parent is gone already
    _name_process("mii_replica")
    order = json.loads(line)
    configure_logs(order["log_level"], order["log_format"])
    start_tracing()
    status_fd = int(sys.argv[1])
    try:
        config = DeployConfig.from_json(order["config"])
        provenance = Provenance.of(config.provenance)
        with ThreadPoolExecutor(1, thread_name_prefix="engine") as thread:
            engine = thread.submit(build_warm_engine, config).result()
            loop = build_loop(config, engine, thread, provenance)
            asyncio.run(_serve(loop, config, provenance, order["socket"], status_fd))
    except MiiServeError as error:
        _report(status_fd, state="failed", error=type(error).__name__, message=str(error))
        return 1
    return 0


def _name_process(name: str) -> None:
    """What lists of processes show instead of "python", where the system lets a process say."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def _end() -> None:
    flush_traces()
    os._exit(0)


def _report(status_fd: int, **status: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # after "ready" the parent reads no more
        os.write(status_fd, json.dumps(status).encode() + b"\n")


async def _serve(loop: ReplicaLoop, config: DeployConfig, provenance: Provenance, socket: str, status_fd: int) -> None:
    if provenance.is_signing:
        running = asyncio.get_running_loop()
        running.add_signal_handler(signal.SIGHUP, lambda: running.run_in_executor(None, provenance.reload))
    server, _ = replica_server(loop, config.deployment_name, ListenOn.socket(Path(socket)))
    await server.start()
    _report(status_fd, state="ready")
    try:
        await loop.run()
    finally:
        await server.stop(grace=1.0)
        loop.engine.close()


if __name__ == "__main__":
    sys.exit(main())

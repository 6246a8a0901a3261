"""Entry point of ranks 1, 2, …: `python -m mii_serve.engine.ranks.follower STATUS_FD`.

Standard input has pickled orders from rank 0: first what to build, a dict, then `Order`s, which are run one by one. On
STATUS_FD goes one pickled object: the engine's description when it is built, or the error that it ended with. The process ends
with rank 0, and rank 0 ends with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from mii_serve.config import DeployConfig
from mii_serve.engine.ranks.order import Order, execute
from mii_serve.engine.turns import MAX_IN_FLIGHT, Turn
from mii_serve.errors import EngineError, MiiServeError
from mii_serve.logs import configure_logs
from mii_serve.models.deferred import import_for_drawing
from mii_serve.parent import end_with_parent

logger = logging.getLogger(__name__)

RANK_0_FIRST_S = 5.0
"""Before a follower ends that has failed. What fails on every rank fails on rank 0 too, which reports it and ends the group; it
would take a follower that ended first for a lost one (`leader.BLAME_S`)."""


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C and hang-ups of a terminal are for the front
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    end_with_parent()
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("mii_rank")
    import_for_drawing("mii_serve.engine.factory", "mii_serve.models.loading")
    first: dict[str, Any] = pickle.load(sys.stdin.buffer)
    configure_logs(first["log_level"], first["log_format"])
    status_fd = int(sys.argv[1])
    try:
        _follow(first, status_fd)
    except EOFError:
        return 1  # rank 0 is gone
    except MiiServeError as error:
        logger.error("rank %d failed: %s", first["rank"], error)
        _report(status_fd, error)
        time.sleep(RANK_0_FIRST_S)
        return 1
    return 0


def _follow(first: dict[str, Any], status_fd: int) -> None:
    import torch

    from mii_serve.engine.factory import build_rank
    from mii_serve.engine.ranks.group import RankGroup

    group = RankGroup(first["rank"], first["size"])
    engine = build_rank(DeployConfig.from_json(first["config"]), group)
    _report(status_fd, engine.description)
    group.connect(first["rendezvous"], torch.device(engine.description.device), first["timeout_s"])
    in_flight: deque[Turn] = deque()
    while True:
        order: Order = pickle.load(sys.stdin.buffer)
        if order.name == "close":
            engine.close()
            group.close()
            return
        try:
            result = execute(engine, group, order)
            if order.name == "launch":  # as rank 0: one turn runs, and one is prepared
                in_flight.append(result)
                if len(in_flight) == MAX_IN_FLIGHT:
                    in_flight.popleft().wait()
        except MiiServeError:
            raise
        except Exception as error:
            raise EngineError(f"{order.name} failed: {type(error).__name__}: {error}") from error


def _report(status_fd: int, status: object) -> None:
    with contextlib.suppress(BrokenPipeError), os.fdopen(os.dup(status_fd), "wb") as pipe:
        pickle.dump(status, pipe)


if __name__ == "__main__":
    sys.exit(main())

"""How many connections there may be: fewer than a process may have open files, so that replicas can always start again."""

from __future__ import annotations

import contextlib
import logging
import resource
from dataclasses import dataclass

from mii_serve.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096
"""On each port, however many files there may be."""
MIN_CONNECTIONS = 32
RESERVED_FILES = 64
"""For libraries, logs, the moderation service, and what is closed a moment later."""
FILES_PER_REPLICA = 16
"""Its pipes and sockets, and those of the next one while they are still open."""
MOST_FILES = 65_536
"""Not raised beyond: a child that closes every file it may have open must not take minutes over it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Most connections at once, on each port."""

    http: int = MAX_CONNECTIONS
    grpc: int = MAX_CONNECTIONS


def connection_limits(replicas: int) -> ConnectionLimits:
    """What this process's limit of open files leaves room for; the limit is raised as far as it goes.

    Raises:
        ConfigError: it is too low to serve at all.
    """
    limit = _raised_limit()
    each = (limit - RESERVED_FILES - replicas * FILES_PER_REPLICA) // 2
    if each < MIN_CONNECTIONS:
        needed = RESERVED_FILES + replicas * FILES_PER_REPLICA + 2 * MIN_CONNECTIONS
        raise ConfigError("ulimit -n", f"this process may have {limit} open files, and {replicas} replicas need {needed}")
    if each < MAX_CONNECTIONS:
        logger.warning("at most %d connections on each port: this process may have %d open files (ulimit -n)", each, limit)
    return ConnectionLimits(http=min(each, MAX_CONNECTIONS), grpc=min(each, MAX_CONNECTIONS))


def _raised_limit() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS has a bound of its own below "infinity"
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft

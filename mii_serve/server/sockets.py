"""Where a replica's private Unix socket lies: a folder of the deployment's own, with a path that the kernel takes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mii_serve.errors import ConfigError

MAX_PATH_BYTES = 100
"""Of a socket's path. Linux takes 107 bytes, macOS 103."""
OTHERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
_PREFIX = "mii_serve-"
_NUM_RANDOM_CHARS = 8  # what tempfile appends


def new_socket_folder(socket_name: str) -> tempfile.TemporaryDirectory[str]:
    """A new folder with mode 0700 below `TMPDIR`, or below another one where that is too long, missing or not writable.

    Raises:
        ConfigError: there is no place for it.
    """
    tried: dict[Path, str] = {}
    for parent in _parents():
        path = parent / (_PREFIX + "x" * _NUM_RANDOM_CHARS) / socket_name
        if len(os.fsencode(path)) > MAX_PATH_BYTES:
            tried[parent] = "its path is too long for a socket"
            continue
        try:
            return tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent, ignore_cleanup_errors=True)
        except OSError as error:
            tried[parent] = error.strerror or str(error)
    reasons = "; ".join(f"{str(parent)[:100]}: {why}" for parent, why in tried.items())
    raise ConfigError("TMPDIR", f"must name a writable folder with a short path, for the replicas' sockets ({reasons})")


def _parents() -> Iterator[Path]:
    """The folders that may hold it, each once, the operator's choice first."""
    named = [os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP", "XDG_RUNTIME_DIR")]
    yield from dict.fromkeys(Path(parent).absolute() for parent in (*named, *OTHERS) if parent)

"""The rule of this folder: a test starts no process and opens no connection. One that does fails.

Nor does it load a model: the folder takes seconds. What needs more is in tests/numeric, tests/contract or tests/integration.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import pytest

with contextlib.suppress(ImportError):  # it binds a socket when it is imported, by whatever is imported first
    import urllib3  # noqa: F401

OUTSIDE = frozenset({"socket.bind", "socket.connect", "subprocess.Popen", "os.posix_spawn", "os.fork"})
"""Names of the interpreter's audit events."""

_seen: set[str] = set()


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event in OUTSIDE:
        _seen.add(event)


sys.addaudithook(_note)


@pytest.fixture(autouse=True)
def nothing_outside() -> Iterator[None]:
    _seen.clear()
    yield
    assert not _seen, f"{sorted(_seen)} in a unit test"

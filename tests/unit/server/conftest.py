"""Tests of this folder run on a clock that jumps to the next thing that happens: no test waits for time to pass."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from virtual_time import VirtualLoop


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, type[VirtualLoop]]:
    return {"virtual": VirtualLoop}


def _now() -> float:
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return 0.0


@pytest.fixture(autouse=True)
def virtual_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The code under test reads the loop's clock."""
    with monkeypatch.context() as patched:
        patched.setattr(time, "monotonic", _now)
        yield

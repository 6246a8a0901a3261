"""A whole server in this process, with one slot or two."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from servers import RunningServer, running_server


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RunningServer]:
    async with running_server(tmp_path, FakeEngine()) as running:
        yield running


@pytest.fixture
async def two_slots(tmp_path: Path) -> AsyncIterator[RunningServer]:
    async with running_server(tmp_path, FakeEngine(max_slots=2)) as running:
        yield running

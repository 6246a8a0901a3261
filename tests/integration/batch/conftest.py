from collections.abc import Iterator

import pytest
from batch_jobs import pictures
from commands import process_as_before as process_as_before
from commands import run as run
from scripted_server import RunningServer, running


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running() as server:
        server.servicer.script = pictures
        yield server

from collections.abc import Iterator

import pytest
from scripted_server import RunningServer, running

from mii_serve.client import Client


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running() as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from mii_serve.safe_path import SAFE_PATH
from mii_serve.threads import wait_briefly

wait_briefly()  # before any test imports torch, and for every process that tests start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite the files the contract tests compare with")


@pytest.fixture(autouse=True)
def own_import_path() -> Iterator[None]:
    """`mii_serve` called in this process sets a variable for those to come; benchmarks import each other, and need it unset."""
    before = os.environ.pop(SAFE_PATH, None)
    yield
    os.environ.pop(SAFE_PATH, None)
    if before is not None:
        os.environ[SAFE_PATH] = before


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For networks this small: two threads that wait for each other at every layer are slower, on a busy machine by far."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

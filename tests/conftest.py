from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator

import pytest

from mii_serve.safe_path import SAFE_PATH
from mii_serve.threads import wait_briefly

# Before any test imports torch, and for every process that tests start. The networks are small and several processes run at
# once: two threads that wait for each other at each layer take two to three times as long as one.
wait_briefly()
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite the files the contract tests compare with")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays until the end: the garbage collector need not look through it, then or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


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

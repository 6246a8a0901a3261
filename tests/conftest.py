from __future__ import annotations

import pytest

from mii_serve.threads import wait_briefly

wait_briefly()  # before any test imports torch, and for every process that tests start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite the files the contract tests compare with")

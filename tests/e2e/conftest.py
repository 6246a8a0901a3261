from __future__ import annotations

from collections.abc import Iterator

import pytest
from deployments import Deployment, deployed


@pytest.fixture(scope="session")
def deployment() -> Iterator[Deployment]:
    """Of all tests that only draw on it; one that ends, kills or configures a deployment starts its own."""
    with deployed("demo") as running:
        yield running

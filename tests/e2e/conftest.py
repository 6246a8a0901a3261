from __future__ import annotations

from collections.abc import Iterator

import pytest
from deployments import Deployment, deployed


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with deployed("demo") as running:
        yield running

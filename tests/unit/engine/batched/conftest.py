from __future__ import annotations

import pytest

from mii_serve.config import LimitsConfig
from mii_serve.models import LoadedModel, load_model


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    """Without the checker, which blackens a picture of few steps as it likes."""
    return load_model("demo", revision=None, dtype="fp32", device="cpu", limits=LimitsConfig(), enable_safety_checker=False)

"""The built-in model, loaded once as diffusers users load it and once as the server does."""

from __future__ import annotations

from pathlib import Path

import pytest
from drawing import run_alone

import mii_serve.models
from mii_serve.config import LimitsConfig
from mii_serve.engine.reference import ReferenceEngine
from mii_serve.models import LoadedModel, load_model
from mii_serve.types import Picture, RequestedParams

DEMO_FOLDER = Path(mii_serve.models.__file__).parent / "demo"


@pytest.fixture(scope="session")
def pipeline():
    from diffusers import StableDiffusionPipeline

    loaded = StableDiffusionPipeline.from_pretrained(DEMO_FOLDER)
    loaded.set_progress_bar_config(disable=True)
    keep_from_firing(loaded.safety_checker)
    return loaded


@pytest.fixture(scope="session")
def engine() -> ReferenceEngine:
    model = load_model("demo", revision=None, dtype="fp32", device="cpu", limits=LimitsConfig())
    keep_from_firing(model.pipeline.safety_checker)
    return ReferenceEngine(model)


def keep_from_firing(checker) -> None:
    """A picture of a few steps looks like anything, and two black pictures are equal too easily."""
    checker.concept_embeds_weights.data.fill_(2.0)


@pytest.fixture
def draw(engine):
    """Draw one request on the reference engine: its pictures, and how many steps each took."""

    def draw_request(**asked) -> list[tuple[Picture, int]]:
        requested = RequestedParams(**{"prompt": "a red circle on a blue background", "seed": 3, **asked})
        params = engine.capabilities.resolve(requested, fallback_seed=0)
        return [run_alone(engine, params, i) for i in range(params.num_images_per_prompt)]

    return draw_request


@pytest.fixture(scope="session")
def demo() -> LoadedModel:
    """Without the checker, which blackens a picture of few steps as it likes."""
    return load_model("demo", revision=None, dtype="fp32", device="cpu", limits=LimitsConfig(), enable_safety_checker=False)

"""However a model folder is laid out, its pictures are those of `StableDiffusionPipeline.from_pretrained(folder)(...)`."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from model_folders import Layout, copy_of_the_demo
from model_layouts import LAYOUTS
from plain_diffusers import (
    LEVELS_OFF,
    faults,
    our_engine,
    our_model,
    our_pictures,
    plain_picture,
    plain_pipeline,
    told,
    with_named_sampler,
)

from mii_serve.models import LoadedModel

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

FEW = {"num_inference_steps": 4}
NAMED = "dpm++_2m"
BLACK = "a checker that fires"

Built = tuple[Path, Layout]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Callable[[str], Built]:
    places = []

    @functools.cache
    def build(name: str) -> Built:
        place = tmp_path_factory.mktemp("layout")
        places.append(place)
        folder = copy_of_the_demo(place / "model")
        return folder, LAYOUTS[name](folder) or Layout()

    yield build
    for place in places:
        shutil.rmtree(place)


@pytest.fixture(scope="module")
def loaded(built) -> Callable[[str], LoadedModel]:
    """Once for both engines, the reference first: the native engine may lay the weights out in another way."""

    @functools.lru_cache(1)
    def load(name: str) -> LoadedModel:
        folder, layout = built(name)
        return our_model(folder.parent / layout.ours if layout.ours else folder, allow_pickle=layout.allow_pickle)

    return load


@pytest.fixture(scope="module")
def expected_of(built) -> Callable[[str], dict[str, np.ndarray | None]]:
    @functools.cache
    def draw(name: str) -> dict[str, np.ndarray | None]:
        folder, layout = built(name)
        pipeline = plain_pipeline(folder, **layout.plain)
        asked = {**FEW, **layout.asked}
        drawn = {"default": pipeline, NAMED: with_named_sampler(pipeline, NAMED)}
        return {request: plain_picture(one, **asked) for request, one in drawn.items()}

    return draw


def test_there_are_as_many_layouts_as_promised():
    assert len(LAYOUTS) >= 40


@pytest.mark.parametrize("engine_name", LEVELS_OFF)
@pytest.mark.parametrize("name", LAYOUTS)
def test_pictures_of_every_layout_are_those_of_diffusers(built, loaded, expected_of, engine_name, name):
    _, layout = built(name)
    expected = expected_of(name)
    assert all((picture.max() > 100) == (name != BLACK) for picture in expected.values()), "black pictures prove nothing"
    asked = {**FEW, **layout.asked}
    requests = {"default": asked, NAMED: {**asked, "scheduler": NAMED}}
    made = our_pictures(our_engine(engine_name, loaded(name)), requests)
    wrong = faults(expected, made, LEVELS_OFF[engine_name])
    assert not wrong, told(wrong)


def test_defaults_that_a_model_declares_are_those_of_a_request_that_says_nothing(built, expected_of):
    folder, _ = built("declared defaults")
    made = our_pictures(our_engine("reference", our_model(folder)), {"default": {}})
    assert not faults({"default": expected_of("declared defaults")["default"]}, made, 0)

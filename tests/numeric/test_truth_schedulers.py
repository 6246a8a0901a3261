"""Whatever scheduler a model folder declares, its pictures are those of `StableDiffusionPipeline.from_pretrained(folder)(...)`.

The default request names no scheduler, so it gets the model's own with every option of it; a named sampler is what a user of
diffusers gets from `from_config(pipe.scheduler.config, ...)`. Only the scheduler's file changes: the weights are the demo's.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from plain_diffusers import (
    LEVELS_OFF,
    Drawn,
    faults,
    our_engine,
    our_model,
    our_pictures,
    plain_picture,
    plain_pipeline,
    told,
    with_named_sampler,
)
from scheduler_configs import LINEAR, NAMED, NOT_LINEAR, SCHEDULER_CONFIGS, Config

from mii_serve.models import loading
from mii_serve.models.source import DEMO_FOLDER

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

OWNER: ContextVar[str] = ContextVar("OWNER")
"""The engine that weights are being loaded for."""

FEW = {"num_inference_steps": 5}
FEWER = {"num_inference_steps": 4}
ENTIRELY_DEFAULT = ("pndm without steps_offset", "dpm sde, karras")
"""Drawn once as `pipe(prompt)` with nothing else said, 50 steps."""

ALWAYS_NAMED = ("pndm", "ddim", "ddpm", "dpm++_2m")
OTHERS_NAMED = tuple(name for name in NAMED if name not in ALWAYS_NAMED)

NAMED_ON = (
    "pndm",
    "pndm without steps_offset",
    "pndm v-prediction",
    "ddim",
    "ddim without clip_sample",
    "ddim with clip_sample true",
    "ddim with betas only",
    "ddim v-prediction, zero snr, trailing",
    "ddim linear betas",
    "ddim thresholding",
    "ddpm",
    "ddpm without clip_sample",
    "euler",
    "euler leading without steps_offset",
    "euler karras",
    "euler exponential",
    "euler beta",
    "euler v-prediction",
    "euler v-prediction, continuous",
    "euler_a",
    "heun",
    "kdpm2 karras",
    "lms beta",
    "dpm",
    "dpm order 3, karras",
    "dpm lu",
    "dpm exponential",
    "dpm sde, karras",
    "dpm dpmsolver",
    "dpm v-prediction, zero snr, trailing",
    "dpm clipped lambda, cosine betas",
    "dpm flow",
    "dpm single",
    "dpm thresholding",
    "unipc",
    "unipc epsilon inside",
    "deis order 3, karras",
    "lcm",
    "tcd",
    "pndm with Runge-Kutta steps",
    "pndm with betas only",
    "sasolver",
    "ipndm",
    "edm euler",
)
"""Where named samplers are drawn too; from the other configs they take nothing that they do not take from these."""


@pytest.fixture(scope="module", autouse=True)
def weights_loaded_once():
    """The files of all folders are the same but for the scheduler's: what is loaded from them is, too.

    Each engine keeps what it has loaded to itself, since it may change it.
    """
    load, loaded = loading._load_weights, {}

    def kept(part, dtype, device, shard):
        key = OWNER.get(), part.name
        if key not in loaded:
            loaded[key] = load(part, dtype, device, shard)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_load_weights", kept)
        yield


def folder_with_scheduler(folder: Path, config: Config) -> Path:
    """The demo model without checker and without defaults of its own, with this scheduler."""
    for part in ("unet", "vae", "text_encoder", "tokenizer"):
        (folder / part).symlink_to(DEMO_FOLDER / part)
    index = json.loads((DEMO_FOLDER / "model_index.json").read_text())
    index |= {
        "scheduler": ["diffusers", config["_class_name"]],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index | {"requires_safety_checker": False}))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory) -> Callable[[str], Path]:
    @functools.cache
    def make(name: str) -> Path:
        return folder_with_scheduler(tmp_path_factory.mktemp("model"), SCHEDULER_CONFIGS[name])

    return make


def requests_of(name: str, engine_name: str = "native") -> dict[str, dict[str, object]]:
    """The default request; then four named samplers, and two of the others in rotation.

    The reference, which draws with diffusers' own objects and one image at a time, gets one of the four, in rotation as well.
    """
    if name not in NAMED_ON:
        return {"default": FEW}
    at = NAMED_ON.index(name)
    always = ALWAYS_NAMED if engine_name == "native" else (ALWAYS_NAMED[at % len(ALWAYS_NAMED)],)
    named = *always, *(OTHERS_NAMED[i % len(OTHERS_NAMED)] for i in (2 * at, 2 * at + 1))
    return {"default": FEW, **{sampler: {**FEWER, "scheduler": sampler} for sampler in named}}


@pytest.fixture(scope="module")
def plain_of(folder_of) -> Callable[[str], Any]:
    """diffusers' own pipeline of a folder, with the weights of the first one."""
    first: dict[str, Any] = {}

    @functools.cache
    def load(name: str) -> Any:
        pipeline = plain_pipeline(folder_of(name), **first)
        first.update({part: getattr(pipeline, part) for part in ("unet", "vae", "text_encoder")})
        return pipeline

    return load


@pytest.fixture(scope="module")
def expected_of(plain_of) -> Callable[[str], Drawn]:
    @functools.cache
    def draw(name: str) -> Drawn:
        pipeline = plain_of(name)
        chosen = {
            sampler: pipeline if sampler == "default" else with_named_sampler(pipeline, sampler)
            for sampler in requests_of(name)
        }
        steps = {sampler: FEW if sampler == "default" else FEWER for sampler in chosen}
        return {sampler: plain_picture(one, **steps[sampler]) for sampler, one in chosen.items()}

    return draw


@pytest.fixture(scope="module")
def made_of(folder_of) -> Callable[[str, str], Drawn]:
    @functools.cache
    def draw(engine_name: str, name: str) -> Drawn:
        OWNER.set(engine_name)
        engine = our_engine(engine_name, our_model(folder_of(name)))
        try:
            return our_pictures(engine, requests_of(name, engine_name))
        finally:
            engine.close()

    return draw


def test_the_matrix_is_as_large_as_promised():
    assert len(SCHEDULER_CONFIGS) >= 100
    assert len(set(NAMED_ON)) == len(NAMED_ON) >= 40
    assert all(len(requests_of(name)) == 1 + 6 for name in NAMED_ON)
    for engine_name in LEVELS_OFF:
        assert {sampler for name in NAMED_ON for sampler in requests_of(name, engine_name)} == {"default", *NAMED}
    assert not set(LINEAR) & set(NOT_LINEAR)


@pytest.mark.parametrize("engine_name", LEVELS_OFF)
@pytest.mark.parametrize("name", SCHEDULER_CONFIGS)
def test_a_request_that_names_no_scheduler_is_drawn_as_diffusers_draws_it(expected_of, made_of, engine_name, name):
    expected = {"default": expected_of(name)["default"]}
    assert expected["default"] is not None
    assert len(set(expected["default"].flat)) > 64, "a picture with nothing on it would prove nothing"
    wrong = faults(expected, made_of(engine_name, name), LEVELS_OFF[engine_name])
    assert not wrong, told(wrong)


@pytest.mark.parametrize("engine_name", LEVELS_OFF)
@pytest.mark.parametrize("name", NAMED_ON)
def test_named_samplers_are_drawn_as_diffusers_draws_them(expected_of, made_of, engine_name, name):
    made = {sampler: picture for sampler, picture in made_of(engine_name, name).items() if sampler != "default"}
    wrong = faults({sampler: expected_of(name)[sampler] for sampler in made}, made, LEVELS_OFF[engine_name])
    assert not wrong, told(wrong)


@pytest.mark.parametrize("engine_name", LEVELS_OFF)
@pytest.mark.parametrize("name", ENTIRELY_DEFAULT)
def test_a_prompt_and_nothing_else_is_drawn_as_diffusers_draws_it(folder_of, plain_of, engine_name, name):
    expected = {"default": plain_picture(plain_of(name))}
    OWNER.set(engine_name)
    wrong = faults(
        expected, our_pictures(our_engine(engine_name, our_model(folder_of(name))), {"default": {}}), LEVELS_OFF[engine_name]
    )
    assert not wrong, told(wrong)

"""The gateway's parameters follow their declarations: a new one is accepted, described and offered without an edit here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mii_serve.gateway import openapi, parameters
from mii_serve.gateway.dialects import azure_score, huggingface, openai
from mii_serve.gateway.json_body import validated
from mii_serve.gateway.page import messages
from mii_serve.gateway.parameters import Parameters, requested, with_parameters
from mii_serve.types import OWN_STEPS, PARAMETER_NAMES, PARAMETERS, Activity, GenerationDefaults, Limits, Parameter, ServerInfo

NEW = Parameter(name="more", kind=int, bounds=lambda limits: (0, 11), default=0, help="a parameter that is new")


@pytest.fixture
def with_new(monkeypatch):
    monkeypatch.setattr(parameters, "PARAMETERS", (*PARAMETERS, NEW))
    monkeypatch.setattr(parameters, "PARAMETER_NAMES", (*PARAMETER_NAMES, NEW.name))


def test_every_dialect_has_every_parameter_under_its_own_or_the_apis_name():
    names = {*PARAMETER_NAMES, *(one.name for one in OWN_STEPS), "loras"}
    assert names == {*azure_score.ScoreParameters.model_fields} | {"prompt"}
    task = {*huggingface.TaskParameters.model_fields} - {"strength", "target_size", "mask_image"}
    assert names == task | {"num_images_per_prompt"}
    renamed = {"height", "width", "num_images_per_prompt"}
    assert names - renamed <= set(openai.ImagesBody.model_fields)
    assert names == {*messages.PageBody.model_fields} - {"preview_every", "strength"}


def test_a_declaration_is_all_that_a_body_needs(with_new):
    model = with_parameters(Parameters, parameters.names_without("prompt"))
    assert validated(model, {"more": 2.0, "height": None}).given() == {"more": 2}


def test_a_declaration_is_all_that_the_page_and_the_description_need(server_info):
    assert openapi._schema(NEW) == {
        "type": "integer",
        "description": NEW.help,
        "minimum": 0,
        "maximum": 11,
        "nullable": True,
    }
    assert messages._parameter_to_json(NEW, server_info) == {
        "name": "more",
        "type": "integer",
        "help": NEW.help,
        "default": 0,
        "least": 0,
        "most": 11,
        "multiple_of": None,
    }
    offered = {one["name"]: one for one in messages.info_to_json(server_info, None)["parameters"]}
    assert list(offered) == list(PARAMETER_NAMES)
    assert (offered["height"]["least"], offered["height"]["most"], offered["height"]["multiple_of"]) == (64, 512, 8)
    assert offered["num_inference_steps"]["default"] == 7


@pytest.mark.parametrize("seed", [-1, None])
def test_a_seed_that_asks_for_any_is_none(seed):
    assert requested({"prompt": "a", "seed": seed}).seed is None


def test_other_seeds_are_kept():
    assert (requested({"prompt": "a", "seed": 0}).seed, requested({"prompt": "a", "seed": -2}).seed) == (0, -2)


@pytest.fixture
def server_info():
    counts = dict.fromkeys(Activity.__dataclass_fields__, 0)
    return ServerInfo(
        version="1",
        deployment_name="test",
        model="fake",
        model_revision="",
        engine="fake",
        dtype="fp32",
        device="cpu",
        has_safety_checker=True,
        defaults=GenerationDefaults(scheduler="default", num_inference_steps=7),
        limits=replace(Limits(), max_size_px=512),
        schedulers={"default": "default"},
        activity=Activity(**counts),
    )

"""AUTOMATIC1111's names of samplers, and what its prompts say of LoRAs."""

from __future__ import annotations

import pytest

from mii_serve.errors import InvalidRequestError
from mii_serve.gateway.dialects.sdapi.prompts import refuse_scheduled, without_loras
from mii_serve.gateway.dialects.sdapi.samplers import SAMPLERS, chosen, samplers_to_json
from mii_serve.samplers.names import SAMPLERS as OURS
from mii_serve.types import Capabilities, GenerationDefaults, Limits

CAPABILITIES = Capabilities(
    limits=Limits(), defaults=GenerationDefaults(scheduler="default"), schedulers={"default": "default"} | {n: n for n in OURS}
)


@pytest.mark.parametrize(
    ("sampler", "schedule_type", "eta", "scheduler", "shown"),
    [
        ("", "", None, None, ("Default", "Automatic")),
        ("default", "Automatic", 1.0, None, ("Default", "Automatic")),
        ("Euler a", "Automatic", 1.0, "euler_a", ("Euler a", "Automatic")),
        ("k_euler_a", "", 0, "euler", ("Euler a", "Automatic")),
        ("Euler a", "Karras", 0, "euler_karras", ("Euler a", "Karras")),
        ("DPM++ 2M", "", None, "dpm++_2m_karras", ("DPM++ 2M", "Automatic")),
        ("DPM++ 2M", "uniform", None, "dpm++_2m", ("DPM++ 2M", "Uniform")),
        ("dpm++ 2m karras", "automatic", None, "dpm++_2m_karras", ("DPM++ 2M", "Karras")),
        ("DPM++ 3M SDE Exponential", "Karras", 1, "dpm++_3m_sde_exponential", ("DPM++ 3M SDE", "Exponential")),
        ("UniPC", "Karras", 1.0, "unipc", ("UniPC", "Automatic")),
        ("DDIM", "", 1.0, "ddim", ("DDIM", "Automatic")),
        ("heun_beta", "", None, "heun_beta", ("heun_beta", "Automatic")),
    ],
)
def test_names_stand_for_our_schedulers(sampler, schedule_type, eta, scheduler, shown):
    found = chosen(sampler, schedule_type, eta, CAPABILITIES)
    assert (found.scheduler, (found.sampler, found.schedule_type)) == (scheduler, shown)


@pytest.mark.parametrize(
    ("sampler", "schedule_type", "eta", "field"),
    [
        ("DPM fast", "", None, "sampler_name"),
        ("DDIM Karras", "", None, "sampler_name"),
        ("x" * 10_000, "", None, "sampler_name"),
        ("Euler", "SGM Uniform", None, "scheduler"),
        ("Euler a", "Karras", None, "scheduler"),
        ("Default", "Karras", None, "scheduler"),
        ("heun_beta", "Karras", None, "scheduler"),
        ("Euler a", "", 0.5, "eta"),
        ("DPM++ SDE", "", 0, "eta"),
    ],
)
def test_what_is_not_here_is_refused_by_name(sampler, schedule_type, eta, field):
    with pytest.raises(InvalidRequestError) as caught:
        chosen(sampler, schedule_type, eta, CAPABILITIES)
    assert caught.value.field == field and len(str(caught.value)) < 600


def test_every_sampler_stands_for_one_of_ours():
    assert {sampler.ours for sampler in SAMPLERS} <= set(OURS)
    listed = samplers_to_json(CAPABILITIES)
    assert len(listed) == len(SAMPLERS) + 1
    for one in listed:
        chosen(one["name"], "", None, CAPABILITIES)


def test_loras_of_a_prompt():
    assert without_loras("a <lora:film:0.8>, b <LORA:Old Paper>", "prompt") == ("a , b ", {"film": 0.8, "Old Paper": 1.0})
    assert without_loras("a <lyco:film:0.5:0.5> <3 >:( <lora: <b>", "prompt") == ("a  <3 >:( <lora: <b>", {"film": 0.5})
    for bad in (
        "<lora:a:x>",
        "<lora:a:1:2>",
        "<lora:a:1><lora:a:1>",
        "<lora::1>",
        "<hypernet:a:1>",
        "<lora:a:nan>",
        "<lora:a:>",
    ):
        with pytest.raises(InvalidRequestError, match=r"^prompt: "):
            without_loras(bad, "prompt")


def test_prompts_that_change_on_the_way_are_refused():
    for fine in (
        "[a]",
        "(a:1.2) [b (c:0.5)]",
        r"\[a:b:0.5\]",
        "a | b",
        "a and b",
        "BRAND",
        "[a:b]",
        "[" * 100_000,
        "[a" * 50_000,
    ):
        refuse_scheduled(fine, "prompt")
    for bad in ("[a:b:0.5]", "a [b:10] c", "[a::.5 ]", "[a|b]", "a AND b"):
        with pytest.raises(InvalidRequestError, match=r"^prompt: "):
            refuse_scheduled(bad, "prompt")

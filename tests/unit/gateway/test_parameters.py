"""What foreign clients write: a foreign name is answered with ours, and numbers are read as JSON means them."""

from __future__ import annotations

import pytest

from mii_serve.gateway import huggingface, openai, score
from mii_serve.gateway.parameters import meant, settled

OPENAI = openai.KNOWN


@pytest.mark.parametrize(
    ("written", "known", "ours"),
    [
        ("steps", score.PARAMETERS, "num_inference_steps"),
        ("n_steps", OPENAI, "num_inference_steps"),
        ("numInferenceSteps", OPENAI, "num_inference_steps"),
        ("cfg_scale", huggingface.PARAMETERS, "guidance_scale"),
        ("CFG-Scale", score.PARAMETERS, "guidance_scale"),
        ("guidance", OPENAI, "guidance_scale"),
        ("sampler_name", score.PARAMETERS, "scheduler"),
        ("n", score.PARAMETERS, "num_images_per_prompt"),
        ("num_images_per_prompt", OPENAI, "n"),
        ("width", OPENAI, "size"),
        ("h", OPENAI, "size"),
        ("h", score.PARAMETERS, "height"),
        ("negativePrompt", OPENAI, "negative_prompt"),
        ("prompt", ("inputs", "parameters", "options"), "inputs"),
        ("gidance_scale", score.PARAMETERS, "guidance_scale"),
        ("colour", score.PARAMETERS, None),
        ("x" * 1_000_000, score.PARAMETERS, None),
    ],
)
def test_a_foreign_name_is_answered_with_ours(written, known, ours):
    assert meant(written, known) == ours


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"num_inference_steps": 4.0, "seed": 7.0}, {"num_inference_steps": 4, "seed": 7}),
        ({"height": 64.5, "guidance_scale": 7.0}, {"height": 64.5, "guidance_scale": 7.0}),
        ({"seed": -1}, {"seed": None}),
        ({"seed": -1.0}, {"seed": None}),
        ({"seed": -2, "width": "64"}, {"seed": -2, "width": "64"}),
        ({"seed": True, "num_images_per_prompt": None}, {"seed": True, "num_images_per_prompt": None}),
        ({"seed": float("inf")}, {"seed": float("inf")}),
    ],
)
def test_numbers_are_read_as_json_means_them(given, read):
    told = settled(given)
    assert told == read and [type(value) for value in told.values()] == [type(value) for value in read.values()]

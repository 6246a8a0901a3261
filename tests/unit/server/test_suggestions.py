"""The refusal of a name of another server's says which of ours was meant."""

from __future__ import annotations

import pytest

from mii_serve.gateway.dialects import azure_score, huggingface, openai
from mii_serve.server.suggestions import meant

OPENAI = tuple(openai.ImagesBody.model_fields)


@pytest.mark.parametrize(
    ("written", "known", "ours"),
    [
        ("steps", azure_score.SCORE_PARAMETERS, "num_inference_steps"),
        ("n_steps", OPENAI, "num_inference_steps"),
        ("numInferenceSteps", OPENAI, "num_inference_steps"),
        ("cfg_scale", huggingface.TASK_PARAMETERS, "guidance_scale"),
        ("CFG-Scale", azure_score.SCORE_PARAMETERS, "guidance_scale"),
        ("guidance", OPENAI, "guidance_scale"),
        ("sampler_name", azure_score.SCORE_PARAMETERS, "scheduler"),
        ("n", azure_score.SCORE_PARAMETERS, "num_images_per_prompt"),
        ("num_images_per_prompt", OPENAI, "n"),
        ("width", OPENAI, "size"),
        ("h", OPENAI, "size"),
        ("h", azure_score.SCORE_PARAMETERS, "height"),
        ("negativePrompt", OPENAI, "negative_prompt"),
        ("prompt", ("inputs", "parameters", "options"), "inputs"),
        ("gidance_scale", azure_score.SCORE_PARAMETERS, "guidance_scale"),
        ("colour", azure_score.SCORE_PARAMETERS, None),
        ("x" * 1_000_000, azure_score.SCORE_PARAMETERS, None),
    ],
)
def test_a_foreign_name_is_answered_with_ours(written, known, ours):
    assert meant(written, known) == ours

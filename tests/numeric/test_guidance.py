"""Guidance of a batch is that of the pipeline, sample by sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from plain_diffusers import LEVELS_OFF, PROMPT, our_engine, our_model, our_pictures, plain_picture, plain_pipeline

import mii_serve.models
from mii_serve.samplers.guidance import guide

DEMO = Path(mii_serve.models.__file__).parent / "demo"
REQUESTS = {
    "rescaled": {"guidance_rescale": 0.7, "guidance_scale": 9.0, "num_inference_steps": 8},
    "wholly": {"guidance_rescale": 1.0, "guidance_scale": 9.0, "num_inference_steps": 8},
    "not rescaled": {"guidance_scale": 9.0, "num_inference_steps": 8},
    "without guidance": {"guidance_rescale": 0.7, "guidance_scale": 1.0, "num_inference_steps": 8},
}


def test_each_sample_has_its_own_scale_and_rescaling():
    uncond, text = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scales, rescales = torch.tensor([3.0, 7.5, 1.5, 7.5]), torch.tensor([0.0, 0.7, 1.0, 0.0])
    guided = guide(uncond, text, scales, rescales)
    for i in range(4):
        plain = uncond[i : i + 1] + scales[i] * (text[i : i + 1] - uncond[i : i + 1])
        if rescales[i] == 0:
            assert torch.equal(guided[i : i + 1], plain), "to the bit"
        else:
            expected = rescale_noise_cfg(plain, text[i : i + 1], float(rescales[i]))
            torch.testing.assert_close(guided[i : i + 1], expected, rtol=1e-6, atol=1e-6)


def test_a_row_that_only_pads_the_batch_stays_finite_without_rescaling():
    zeros = torch.zeros(1, 4, 8, 8)
    assert torch.equal(guide(zeros, zeros, torch.zeros(1), torch.zeros(1)), zeros)


@pytest.mark.parametrize("engine", LEVELS_OFF)
def test_rescaled_requests_in_one_batch_are_the_pipelines_pictures(engine):
    pipeline = plain_pipeline(DEMO, safety_checker=None)
    size = {"height": 64, "width": 64}
    loaded = our_engine(engine, our_model(DEMO))
    with loaded.probe().without_checker():
        ours = our_pictures(loaded, {name: {**asked, **size, "scheduler": "default"} for name, asked in REQUESTS.items()})
    plain = {name: plain_picture(pipeline, PROMPT, **asked, **size) for name, asked in REQUESTS.items()}
    for name, expected in plain.items():
        assert not isinstance(ours[name], str), ours[name]
        assert np.abs(ours[name] - expected).max() <= LEVELS_OFF[engine], name
    assert np.abs(plain["wholly"] - plain["not rescaled"]).max() > 20, "the parameter changes the picture"

"""Guidance of a batch is that of the pipeline, sample by sample."""

from __future__ import annotations

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from mii_serve.engine.batched.guidance import guide


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

"""MII hands its kwargs to diffusers' pipeline; we know each of them by name."""

from __future__ import annotations

import inspect

from diffusers import StableDiffusionPipeline

from mii_serve.proto.mii_codec import MII_KWARGS, REFUSED_KWARGS


def test_every_parameter_of_diffusers_pipeline_is_taken_or_refused_by_name():
    known = set(inspect.signature(StableDiffusionPipeline.__call__).parameters) - {"self", "prompt", "kwargs"}
    assert known <= set(MII_KWARGS) | REFUSED_KWARGS
    assert not set(MII_KWARGS) & REFUSED_KWARGS
    assert set(MII_KWARGS) - known == {"seed", "scheduler", "prompt_syntax"}

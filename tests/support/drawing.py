"""Draws one sample on an engine, as nobody but a test would: alone."""

from __future__ import annotations

from mii_serve.engine import Engine
from mii_serve.types import GenerationParams, Picture, RequestedParams, Sample, SampleId, StepPlan


def draw(engine: Engine, **asked: object) -> Picture:
    """The first picture of a request."""
    requested = RequestedParams(**{"prompt": "a red circle on a blue background", "seed": 3, **asked})
    return run_alone(engine, engine.capabilities.resolve(requested, fallback_seed=0), 0)[0]


def run_alone(engine: Engine, params: GenerationParams, image_index: int) -> tuple[Picture, int]:
    """One picture of a request, and the number of UNet calls it took."""
    sample = Sample(id=SampleId("alone", image_index), params=params)
    num_calls = engine.check(params)
    for call in range(1, num_calls + 1):
        [progress] = engine.run(
            StepPlan(
                joins=(sample,) if call == 1 else (),
                steps=(sample.id,),
                decodes=(sample.id,) if call == num_calls else (),
            )
        )
        assert progress.error is None, progress.error
    assert (progress.step, progress.num_steps) == (num_calls, num_calls)
    assert progress.picture is not None
    return progress.picture, num_calls


def largest_difference(one: bytes, other: bytes) -> int:
    """Between two pictures of one size, in any pixel and colour."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))

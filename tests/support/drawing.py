"""Draws samples on an engine without a scheduler: one alone, or several together."""

from __future__ import annotations

from mii_serve.engine import Engine
from mii_serve.types import GenerationParams, Picture, RequestedParams, Sample, SampleId, StepPlan


def draw(engine: Engine, **asked: object) -> Picture:
    """The first picture of a request."""
    requested = RequestedParams(**{"prompt": "a red circle on a blue background", "seed": 3, **asked})
    return run_alone(engine, engine.capabilities.resolve(requested, fallback_seed=0), 0)[0]


def draw_batch(engine: Engine, asked: list[dict[str, object]]) -> list[Picture]:
    """The first picture of each request, all started together; those that end leave, the others go on."""
    samples = [
        Sample(id=SampleId(f"r{i}", 0), params=engine.capabilities.resolve(RequestedParams(**one), fallback_seed=0))
        for i, one in enumerate(asked)
    ]
    left = {sample.id: engine.check(sample.params) for sample in samples}
    pictures: dict[SampleId, Picture] = {}
    joins = tuple(samples)
    while left:
        ending = tuple(sample_id for sample_id, calls in left.items() if calls == 1)
        for progress in engine.run(StepPlan(joins=joins, steps=tuple(left), decodes=ending)):
            if progress.picture is not None:
                pictures[progress.id] = progress.picture
        left = {sample_id: calls - 1 for sample_id, calls in left.items() if calls > 1}
        joins = ()
    return [pictures[sample.id] for sample in samples]


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

"""Makes one picture on an engine, so that "ready" means "has worked"."""

from __future__ import annotations

from mii_serve.engine import Engine
from mii_serve.errors import EngineError
from mii_serve.types import Picture, RequestedParams, Sample, SampleId, StepPlan


def make_picture(engine: Engine, asked: RequestedParams) -> Picture:
    """Run one sample from its first call to its picture, alone.

    Raises:
        EngineError: the engine failed, or the picture is empty.
    """
    params = engine.capabilities.resolve(asked, fallback_seed=0)
    sample = Sample(id=SampleId("warm-up", 0), params=params)
    num_calls = engine.check(params)
    for step in range(num_calls):
        is_last = step + 1 == num_calls
        plan = StepPlan(joins=() if step else (sample,), steps=(sample.id,), decodes=(sample.id,) if is_last else ())
        progress = engine.run(plan)[0]
        if progress.error is not None:
            raise progress.error
    if progress.picture is None or not progress.picture.rgb:
        raise EngineError("the warm-up picture is empty")
    return progress.picture

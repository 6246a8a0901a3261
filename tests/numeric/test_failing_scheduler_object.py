"""An error in one sample's scheduler object costs that sample."""

from __future__ import annotations

import pytest
import torch

from mii_serve.engine.batched.stepping import ObjectStepping
from mii_serve.engine.factory import native_engine
from mii_serve.samplers.run import SamplerRun
from mii_serve.types import RequestedParams, Sample, SampleId, StepPlan


class Failing(ObjectStepping):
    """Fails in its second step: before the UNet call or after it."""

    where = ""

    def before(self, step, states, slot):
        self._fail_if("before", step)
        return super().before(step, states, slot)

    def after(self, step, states, slot, noise_pred):
        self._fail_if("after", step)
        super().after(step, states, slot, noise_pred)

    def _fail_if(self, where, step):
        if step == 1 and where == self.where:
            raise RuntimeError("The size of tensor a (1000) must match the size of tensor b (8)")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["before", "after"])
def test_a_scheduler_object_that_fails_takes_no_other_sample_along(demo, where):
    engine = native_engine(demo)
    params = engine.capabilities.resolve(RequestedParams(prompt="a red circle", num_inference_steps=3, seed=1), fallback_seed=0)
    well, ill = (Sample(id=SampleId(name, 0), params=params) for name in ("well", "ill"))
    engine.run(StepPlan(joins=(well, ill), steps=(well.id, ill.id)))
    scheduler = engine._schedulers.make(SamplerRun("euler", 3), torch.device("cpu"))
    failing = engine._samples[ill.id].stepping = Failing(scheduler, torch.Generator())
    failing.where = where
    first, second = engine.run(StepPlan(steps=(ill.id, well.id), previews=(ill.id, well.id)))
    assert (first.id, second.id) == (ill.id, well.id)
    assert "size of tensor" in str(first.error) and second.error is None and second.preview is not None
    assert ill.id not in engine._samples
    [last] = engine.run(StepPlan(steps=(well.id,), decodes=(well.id,)))
    assert last.picture is not None and last.step == 3

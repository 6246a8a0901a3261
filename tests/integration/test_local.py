"""The replica loop inside the calling process: what a caller does to it leaves the engine as it was."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_engine import FakeEngine

from mii_serve.errors import EngineError
from mii_serve.replica.local import LocalGenerator
from mii_serve.types import GenerationRequest, RequestedParams, Started


def request(num_inference_steps: int) -> GenerationRequest:
    return GenerationRequest(params=RequestedParams(prompt="a", num_inference_steps=num_inference_steps))


def test_a_stream_that_is_closed_early_gives_its_slot_back():
    engine = FakeEngine(max_slots=1)
    with ThreadPoolExecutor(1) as thread:
        local = LocalGenerator(engine, thread)
        stream = local.stream(request(1000))
        while not isinstance(next(stream), Started):
            pass
        stream.close()
        joined = {sample.id for plan in engine.plans for sample in plan.joins}
        assert joined == {sample_id for plan in engine.plans for sample_id in plan.leaves}
        assert len(local.generate(request(2)).images) == 1


def test_a_stream_whose_engine_failed_ends():
    engine = FakeEngine(max_slots=1)
    engine.fail_next()
    with ThreadPoolExecutor(1) as thread, pytest.raises(EngineError):
        LocalGenerator(engine, thread).generate(request(2))

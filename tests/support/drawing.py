"""Draws samples on an engine without a scheduler: one alone, or several together."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from patience import PATIENCE_S

from mii_serve.engine import Engine
from mii_serve.engine.turns import Turns
from mii_serve.scheduler import Scheduler
from mii_serve.types import GenerationParams, Picture, Request, RequestedParams, Sample, SampleId, SampleProgress, StepPlan

if TYPE_CHECKING:
    from mii_serve.engine.ranks.leader import RankedEngine


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


def draw_ahead(engine: Engine, asked: list[dict[str, object]]) -> list[Picture]:
    """The first picture of each request, in turns that are launched as a replica does: one runs, and one is prepared."""
    scheduler = Scheduler(engine.capacity, max_waiting_samples=1000, max_waiting_s=1e9)
    for i, one in enumerate(asked):
        params = engine.capabilities.resolve(RequestedParams(**{"prompt": "a red circle", **one}), fallback_seed=0)
        scheduler.add(Request(id=f"r{i}", params=params, num_calls=engine.check(params)), 0.0)
    has_decoded = threading.Event()
    turns, pictures = Turns(engine, has_decoded.set), dict[str, Picture]()
    while len(pictures) < len(asked):
        if (plan := scheduler.plan()) is None and turns.is_idle:
            assert has_decoded.wait(PATIENCE_S)
            has_decoded.clear()
        for result in turns.step(plan):
            if result.is_turn:
                scheduler.advance(result.progress, result.elapsed_s)
            for progress in result.progress:
                assert progress.error is None, progress.error
                if progress.picture is not None:
                    pictures[progress.id.request_id] = progress.picture
                    scheduler.end(progress)
    return [pictures[f"r{i}"] for i in range(len(asked))]


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


def real_engine(name: str, **settings: object) -> Engine:
    from mii_serve.config import DeployConfig
    from mii_serve.engine.factory import build_engine

    # Without the checker, which takes a picture of three steps for what it likes and blackens it.
    config = {"model": "demo", "engine": name, "device": "cpu", "enable_safety_checker": False, **settings}
    return build_engine(DeployConfig.load(config))


def ranked_engine(num_ranks: int, parallelism: str = "rows") -> RankedEngine:
    """Rank 0 is this process; the others are its children, and end with the engine. One group at a time."""
    from mii_serve.engine.ranks.leader import RankedEngine

    engine = real_engine("native", tensor_parallel=num_ranks, parallelism=parallelism)
    assert isinstance(engine, RankedEngine)
    return engine


def sample(engine: Engine, name: str = "r", index: int = 0, **asked) -> Sample:
    requested = RequestedParams(**{"prompt": "a red circle", "seed": 1, "num_inference_steps": 3, "scheduler": "pndm", **asked})
    return Sample(id=SampleId(name, index), params=engine.capabilities.resolve(requested, fallback_seed=0))


def finish(engine: Engine, *samples: Sample, late: int = 0) -> dict[SampleId, list[SampleProgress]]:
    """Run the samples together to their ends, shape by shape in turns; sample i arrives `late` × i rounds after the first."""
    seen: dict[SampleId, list[SampleProgress]] = {one.id: [] for one in samples}
    calls_left = {one.id: engine.check(one.params) for one in samples}
    for round_number in range(2000):
        arrived = samples[: 1 + round_number // late] if late else samples
        for shape in dict.fromkeys(one.params.latent_shape for one in arrived):
            going = [one for one in arrived if one.params.latent_shape == shape and calls_left[one.id]]
            joins = tuple(one for one in going if not seen[one.id])
            ending = tuple(one.id for one in going if calls_left[one.id] == 1)
            for progress in engine.run(StepPlan(joins=joins, steps=tuple(one.id for one in going), decodes=ending)):
                seen[progress.id].append(progress)
                calls_left[progress.id] -= 1
        if not any(calls_left.values()):
            return seen
    pytest.fail("the samples do not end")


def most_different(one: Picture, other: Picture) -> int:
    """The largest difference of any pixel's channel, in levels of 255."""
    assert (one.width, one.height) == (other.width, other.height)
    pairs = zip(one.rgb, other.rgb, strict=True)
    return max(abs(a - b) for a, b in pairs)

"""What every engine promises, whatever its kernels."""

from __future__ import annotations

import pytest

from mii_serve.engine import Engine
from mii_serve.engine.fake import FakeEngine
from mii_serve.errors import InvalidRequestError
from mii_serve.types import Picture, RequestedParams, Sample, SampleId, SampleProgress, StepPlan


def reference_engine() -> Engine:
    from mii_serve.config import DeployConfig
    from mii_serve.engine.factory import build_engine

    # Without the checker, which takes a picture of three steps for what it likes and blackens it.
    config = {"model": "demo", "engine": "reference", "device": "cpu", "enable_safety_checker": False}
    return build_engine(DeployConfig.load(config))


@pytest.fixture(scope="module", params=["fake", "reference"])
def engine(request: pytest.FixtureRequest):
    built = FakeEngine(max_slots=3) if request.param == "fake" else reference_engine()
    yield built
    built.close()


def sample(engine: Engine, name: str = "r", index: int = 0, **asked) -> Sample:
    requested = RequestedParams(**{"prompt": "a red circle", "seed": 1, "num_inference_steps": 3, "scheduler": "pndm", **asked})
    return Sample(id=SampleId(name, index), params=engine.capabilities.resolve(requested, fallback_seed=0))


def finish(engine: Engine, *samples: Sample) -> dict[SampleId, list[SampleProgress]]:
    """Run the samples together to their ends."""
    seen: dict[SampleId, list[SampleProgress]] = {one.id: [] for one in samples}
    running, joins = [one.id for one in samples], samples
    for _ in range(200):
        if not running:
            return seen
        for progress in engine.run(StepPlan(joins=joins, steps=tuple(running))):
            seen[progress.id].append(progress)
            if progress.picture is not None:
                running.remove(progress.id)
        joins = ()
    pytest.fail("the samples do not end")


def picture(engine: Engine, **asked) -> Picture:
    one = sample(engine, **asked)
    last = finish(engine, one)[one.id][-1].picture
    assert last is not None
    return last


def test_warm_up_says_how_many_fit_and_leaves_nothing_behind(engine):
    assert engine.warmup().max_slots >= 1
    assert engine.run(StepPlan()) == ()


def test_steps_count_up_by_one_and_the_picture_comes_with_the_last(engine):
    one = sample(engine)
    progress = finish(engine, one)[one.id]
    assert [p.step for p in progress] == list(range(1, progress[0].num_steps + 1))
    assert {p.num_steps for p in progress} == {len(progress)}
    assert [p.picture is not None for p in progress] == [False] * (len(progress) - 1) + [True]


def test_a_picture_has_the_size_asked_for_in_rgb(engine):
    made = picture(engine, height=72, width=128)
    assert (made.height, made.width, len(made.rgb)) == (72, 128, 72 * 128 * 3)


def test_progress_comes_in_the_order_of_the_plan(engine):
    samples = [sample(engine, "a"), sample(engine, "b")]
    ids = tuple(reversed([one.id for one in samples]))
    assert [p.id for p in engine.run(StepPlan(joins=tuple(samples), steps=ids))] == list(ids)
    engine.run(StepPlan(leaves=ids))


def test_the_same_sample_twice_is_the_same_bits_and_another_seed_is_not(engine):
    assert picture(engine) == picture(engine)
    assert picture(engine).rgb != picture(engine, seed=2).rgb


def test_image_i_of_a_seed_is_image_0_of_seed_plus_i(engine):
    later = sample(engine, index=2, num_images_per_prompt=3)
    assert finish(engine, later)[later.id][-1].picture == picture(engine, seed=3)


def test_company_does_not_change_a_picture(engine):
    """For an engine that batches the bound is one level; these two compute every image by itself."""
    samples = [sample(engine, f"r{i}", seed=i, num_inference_steps=2 + i) for i in range(3)]
    together = finish(engine, *samples)
    for i, one in enumerate(samples):
        assert together[one.id][-1].picture == picture(engine, seed=i, num_inference_steps=2 + i)


def test_a_sample_that_leaves_is_forgotten_and_others_go_on(engine):
    stays, leaves = sample(engine, "stays"), sample(engine, "leaves")
    engine.run(StepPlan(joins=(stays, leaves), steps=(stays.id, leaves.id)))
    engine.run(StepPlan(leaves=(leaves.id,), steps=(stays.id,)))
    again = sample(engine, "leaves")
    [progress] = engine.run(StepPlan(joins=(again,), steps=(again.id,)))
    assert progress.step == 1, "it starts from the beginning"
    engine.run(StepPlan(leaves=(again.id, stays.id)))


def test_leaving_twice_or_unknown_is_no_error(engine):
    assert engine.run(StepPlan(leaves=(SampleId("nobody", 0),))) == ()


def test_what_the_schedulers_cannot_do_is_refused_by_name(engine):
    params = sample(engine, scheduler="lcm", num_inference_steps=100).params
    with pytest.raises(InvalidRequestError) as caught:
        engine.check(params)
    assert caught.value.field == "num_inference_steps"


def test_the_description_and_capabilities_agree(engine):
    assert engine.description.engine in ("fake", "reference")
    assert engine.capabilities.defaults.scheduler in engine.capabilities.schedulers.values()

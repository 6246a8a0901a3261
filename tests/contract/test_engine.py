"""What every engine promises, whatever its kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
from deepspeed_operations import torch_operations
from drawing import finish, most_different, ranked_engine, real_engine, sample
from fake_engine import FakeEngine

from mii_serve.engine import Engine
from mii_serve.errors import InvalidRequestError
from mii_serve.types import ENGINES, InputImage, Picture, SampleId, StepPlan

ON_RANKS = [pytest.param(f"native, {how} on 2 ranks", marks=pytest.mark.slow) for how in ("rows", "tensor")]


@contextlib.contextmanager
def deepspeed_on_cpu() -> Iterator[Engine]:
    """In float16 on a CPU, with torch in the place of the compiled operations; one thread is faster there."""
    import torch

    from mii_serve.config import LimitsConfig
    from mii_serve.engine.factory import deepspeed_engine
    from mii_serve.models import load_model

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    limits = LimitsConfig()
    with torch_operations():
        model = load_model("demo", revision=None, dtype="fp16", device="cpu", limits=limits, enable_safety_checker=False)
        yield deepspeed_engine(model, max_slots=8)
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module", params=["fake", *ENGINES, *ON_RANKS])
def engine(request: pytest.FixtureRequest):
    with contextlib.ExitStack() as stack:
        if request.param == "fake":
            built: Engine = FakeEngine(max_slots=3)
        elif request.param == "deepspeed":
            built = stack.enter_context(deepspeed_on_cpu())
        elif request.param.endswith("on 2 ranks"):
            built = ranked_engine(2, request.param.split()[1])
        else:
            built = real_engine(request.param)
        yield built
        built.close()


@pytest.fixture
def levels(engine) -> int:
    """How far apart two pictures of the same request may be; half precision rounds differently in other batches."""
    return 3 if engine.description.dtype == "fp16" else 1


def picture(engine: Engine, **asked) -> Picture:
    one = sample(engine, **asked)
    last = finish(engine, one)[one.id][-1].picture
    assert last is not None
    return last


def test_warm_up_leaves_nothing_behind(engine):
    engine.warmup()
    assert engine.capacity.max_slots >= 1
    assert engine.run(StepPlan()) == ()


def test_steps_count_up_by_one_and_the_picture_comes_with_the_last(engine):
    one = sample(engine)
    progress = finish(engine, one)[one.id]
    assert [p.step for p in progress] == list(range(1, progress[0].num_steps + 1))
    assert {p.num_steps for p in progress} == {len(progress)}
    assert [p.picture is not None for p in progress] == [False] * (len(progress) - 1) + [True]


@pytest.mark.parametrize("mask", [None, bytes(2048) + bytes([255]) * 2048], ids=["whole image", "with a mask"])
def test_an_image_takes_the_place_of_the_first_steps(engine, mask):
    asked = {"image": b"its file", "mask_image": None if mask is None else b"its file", "strength": 0.5}
    one = sample(engine, num_inference_steps=6, height=64, width=64, **asked)
    one = replace(one, input_image=InputImage(rgb=bytes(range(256)) * 48, mask=mask))
    progress = finish(engine, one)[one.id]
    assert len(progress) == engine.check(one.params) < engine.check(replace(one.params, strength=None, has_mask=False))
    assert progress[-1].picture is not None


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


def test_company_does_not_change_a_picture(engine, levels):
    samples = [sample(engine, f"r{i}", seed=i, num_inference_steps=2 + i) for i in range(3)]
    together = finish(engine, *samples)
    for i, one in enumerate(samples):
        made = together[one.id][-1].picture
        assert most_different(made, picture(engine, seed=i, num_inference_steps=2 + i)) <= levels


def test_a_picture_may_be_decoded_in_a_later_turn(engine):
    one = sample(engine)
    for call in range(engine.check(one.params)):
        [progress] = engine.run(StepPlan(joins=() if call else (one,), steps=(one.id,)))
        assert progress.picture is None
    [decoded] = engine.run(StepPlan(decodes=(one.id,)))
    assert (decoded.picture, decoded.step) == (picture(engine), progress.step)
    assert engine.run(StepPlan(leaves=(one.id,))) == ()


def test_a_preview_shows_the_picture_before_it_is_done_and_changes_nothing(engine):
    one = sample(engine, num_inference_steps=12, scheduler="pndm")
    alone = picture(engine, num_inference_steps=12, scheduler="pndm")
    num_calls = engine.check(one.params)
    previews = []
    for call in range(1, num_calls + 1):
        plan = StepPlan(
            joins=(one,) if call == 1 else (),
            steps=(one.id,),
            previews=(one.id,) if call == num_calls - 1 else (),
            decodes=(one.id,) if call == num_calls else (),
        )
        [progress] = engine.run(plan)
        previews.append(progress.preview)
    *others, shown, last = previews
    assert shown is not None
    assert others == [None] * (num_calls - 2)
    assert last is None
    assert progress.picture == alone
    assert most_different(shown, alone) < 128, "a preview near the end resembles the picture"


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
    assert engine.description.engine in ("fake", *ENGINES)
    assert engine.capabilities.defaults.scheduler in engine.capabilities.schedulers.values()

"""The fixed set fits every model."""

from __future__ import annotations

import pytest
from fake_engine import FakeEngine

from mii_serve.errors import InvalidRequestError
from mii_serve.samplers.names import SAMPLERS
from mii_serve.types import LATENT_SCALE, Capabilities, GenerationDefaults, Limits, Picture
from mii_serve.verify.cases import DRAWINGS, picture_cases, small_size, unet_cases, vae_cases
from mii_serve.verify.drawing import draw


def capable(size: int, low: int, high: int) -> Capabilities:
    return Capabilities(
        limits=Limits(min_size_px=low, max_size_px=high),
        defaults=GenerationDefaults(scheduler="pndm", height=size, width=size),
        schedulers={name: name for name in SAMPLERS},
    )


@pytest.mark.parametrize(
    ("size", "low", "high", "expected"),
    [(512, 64, 1024, (392, 264)), (64, 32, 256, (56, 40)), (512, 512, 512, (512, 512)), (64, 60, 70, (64, 64))],
)
def test_the_smaller_size_is_odd_in_cells_and_within_the_limits(size, low, high, expected):
    assert small_size(capable(size, low, high)) == expected


@pytest.mark.parametrize("capabilities", [capable(512, 64, 1024), capable(64, 64, 64)], ids=["two-sizes", "one-size"])
def test_every_question_has_a_name_of_its_own(capabilities):
    pictures = [name for case in picture_cases(capabilities) for name in case.picture_names]
    calls = [case.name for case in unet_cases(capabilities, 4)]
    assert len(set(pictures)) == len(pictures) == len(DRAWINGS) + 1
    assert len(set(calls)) == len(calls) == 8
    assert len(vae_cases(capabilities, 4)) == 4


def test_the_set_is_the_same_every_time():
    capabilities = capable(64, 32, 256)
    first, again = unet_cases(capabilities, 4), unet_cases(capabilities, 4)
    assert all(one.latents.equal(other.latents) for one, other in zip(first, again, strict=True))
    assert all(0.5 < case.latents.std() < 1.5 for case in first), "about what a UNet gets from a sampler"
    assert picture_cases(capabilities) == picture_cases(capabilities)


def test_the_set_has_what_the_promise_names():
    cases = [case.params for case in picture_cases(capable(64, 32, 256))]
    assert {case.scheduler for case in cases} <= set(SAMPLERS)
    assert len({case.scheduler for case in cases}) == len(cases)
    assert {case.guidance_scale > 1 for case in cases} == {True, False}
    assert {0.0, 1.0} <= {case.guidance_scale for case in cases}
    assert any(case.negative_prompt and case.is_guided for case in cases)
    assert any(case.height != case.width and (case.height // LATENT_SCALE) % 2 for case in cases)
    assert any(case.num_images_per_prompt > 1 for case in cases)


class _Crowded(FakeEngine):
    most_at_once = 0

    def run(self, plan):
        self.most_at_once = max(self.most_at_once, len(plan.steps))
        return super().run(plan)


def test_the_batch_is_as_large_as_the_engine_holds_and_arrives_bit_by_bit():
    engine = _Crowded(max_slots=5)
    cases = picture_cases(capable(64, 64, 64))
    made = draw(engine, cases)
    assert list(made) != [] and set(made) == {name for case in cases for name in case.picture_names}
    assert all(isinstance(picture, Picture) for picture in made.values())
    assert engine.most_at_once == 5
    joins = [len(plan.joins) for plan in engine.plans if plan.joins]
    assert len(joins) > len(cases) // 2, "they do not all come at once"
    assert not engine._running


def test_an_image_that_fails_ends_the_drawing_with_its_error():
    engine = FakeEngine(max_slots=2)
    [case, *_] = picture_cases(capable(64, 64, 64))
    engine.fail_sample_of(case.name)
    with pytest.raises(Exception, match="told to fail"):
        draw(engine, [case])


def test_a_sampler_the_engine_refuses_is_an_error_of_its_own():
    engine = FakeEngine()
    engine.check = lambda params: (_ for _ in ()).throw(InvalidRequestError("scheduler", "no"))
    with pytest.raises(InvalidRequestError):
        draw(engine, picture_cases(capable(64, 64, 64))[:1])

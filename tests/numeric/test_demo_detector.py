"""The detector reads true pictures of the small world back, and the rule of grading is not fooled by wrong ones."""

from __future__ import annotations

import random

import pytest
from demo_model.detector import detect
from demo_model.grading import ROWS, Grade, GradedPrompt, detector_accuracy, grade
from demo_model.world import (
    FORBIDDEN_SHAPE,
    HELD_OUT_PAIRS,
    HELD_OUT_TRIPLES,
    RELATIONS,
    Scene,
    Thing,
    is_seen,
    render,
    sample_scene,
)

RED_CIRCLE_ABOVE_BLUE_STAR = GradedPrompt(
    text="a red circle above a blue star on a white background",
    background="white",
    things=(("red", "circle"), ("blue", "star")),
    layout="above",
)


def _thing(color: str, shape: str, x: float = 32, y: float = 32, radius: float = 13) -> Thing:
    return Thing(color, shape, "", x, y, radius)


def _grade(prompt: GradedPrompt, *things: Thing, background: str = "white") -> Grade:
    return grade(prompt, detect(render(Scene(background, things, "one"), random.Random(0))))


@pytest.mark.slow
def test_true_pictures_are_read_back() -> None:
    accuracy = detector_accuracy(150)
    assert accuracy.num_pictures == 150
    assert accuracy.right >= 0.97
    assert accuracy.background == 1.0


@pytest.mark.slow
def test_places_and_sizes_are_read_back() -> None:
    rng = random.Random(5)
    for _ in range(40):
        scene = sample_scene(rng)
        seen = detect(render(scene, rng))
        if len(seen.things) == len(scene.things) == 1:
            thing, found = scene.things[0], seen.things[0]
            assert (found.x, found.y) == pytest.approx((thing.x, thing.y), abs=1.0)
            assert found.radius == pytest.approx(thing.radius, abs=1.0)


def test_what_was_asked_for_is_right() -> None:
    drawn = _grade(RED_CIRCLE_ABOVE_BLUE_STAR, _thing("red", "circle", y=16), _thing("blue", "star", y=48))
    assert drawn.is_right


@pytest.mark.parametrize(
    ("things", "wrong"),
    [
        ([_thing("pink", "circle", y=16), _thing("blue", "star", y=48)], "colors"),
        ([_thing("red", "ring", y=16), _thing("blue", "star", y=48)], "shapes"),
        ([_thing("red", "circle", y=16)], "number"),
        (
            [_thing("red", "circle", 16, 16, 9), _thing("red", "circle", 48, 16, 9), _thing("blue", "star", y=48)],
            "number",
        ),
        ([_thing("red", "circle", y=48), _thing("blue", "star", y=16)], "places"),
        ([_thing("red", "circle", x=17), _thing("blue", "star", x=47)], "places"),
        ([_thing("red", "star", y=16), _thing("blue", "circle", y=48)], "places"),
        ([], "number"),
    ],
    ids=["colour", "shape", "missing", "too many", "swapped", "beside", "colours swapped", "empty"],
)
def test_a_wrong_picture_is_wrong(things: list[Thing], wrong: str) -> None:
    drawn = _grade(RED_CIRCLE_ABOVE_BLUE_STAR, *things)
    assert not drawn.is_right
    assert not getattr(drawn, wrong)


def test_a_wrong_background_is_wrong() -> None:
    things = (_thing("red", "circle", y=16), _thing("blue", "star", y=48))
    drawn = _grade(RED_CIRCLE_ABOVE_BLUE_STAR, *things, background="gray")
    assert not drawn.is_right
    assert not drawn.background


def test_three_are_not_two() -> None:
    asked = ROWS["counts"](1, 0)[0]
    assert asked.layout == "two"
    color, shape = asked.things[0]
    three = [_thing(color, shape, x, radius=9) for x in (12, 32, 52)]
    assert not _grade(asked, *three, background=asked.background).is_right
    assert _grade(asked, *three[::2], background=asked.background).is_right


def test_side_by_side_has_no_order() -> None:
    asked = GradedPrompt(text="", background="white", things=(("red", "moon"), ("green", "tree")), layout="and")
    assert _grade(asked, _thing("green", "tree", x=17), _thing("red", "moon", x=47)).is_right
    assert _grade(asked, _thing("red", "moon", x=17), _thing("green", "tree", x=47)).is_right


@pytest.mark.parametrize("row", ROWS)
def test_a_row_asks_what_its_name_says(row: str) -> None:
    prompts = ROWS[row](96, 0)
    assert len(prompts) == 96
    assert prompts == ROWS[row](96, 0)
    assert prompts != ROWS[row](96, 1)
    for prompt in prompts:
        shows_forbidden = any(shape == FORBIDDEN_SHAPE for _, shape in prompt.things)
        assert shows_forbidden == (row == "forbidden")
        assert prompt.text.endswith(f"{prompt.background} background")
        assert " a orange" not in f" {prompt.text}"
        for color, shape in prompt.things:
            assert color in prompt.text
            assert shape in prompt.text
            assert color != prompt.background
            assert ((color, shape) in HELD_OUT_PAIRS) == (row == "held_out_pairs")
            assert ((color, shape, prompt.background) in HELD_OUT_TRIPLES) == (row == "held_out_triples")
            assert is_seen(color, shape, prompt.background) == (not row.startswith("held_out"))
    if row.startswith("held_out") or row == "seen":
        assert len({prompt.text for prompt in prompts}) == 96
    if row == "relations":
        assert {prompt.layout for prompt in prompts} == set(RELATIONS)

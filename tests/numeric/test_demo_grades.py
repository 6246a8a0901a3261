"""The built-in model draws what it is asked for, as often as its documentation says, by the verdict of a pixel detector."""

from __future__ import annotations

import json

import pytest
from demo_model.grading import rates
from grade_demo_model import checker_report
from publish_demo_grades import GRADES, PAGE, drawings_of, model_sampling, page_with, pndm_sampling, table

MIN_RIGHT = {"held_out_triples": 0.95, "held_out_pairs": 0.95, "counts": 0.80, "relations": 0.75}
MIN_RIGHT_PNDM = 0.75
MIN_FLAGGED = 0.95
MAX_FALSE_ALARMS = 0.02
NUM_PROMPTS, NUM_PROMPTS_PNDM = 24, 12
"""Of each row: the first of those that its documented grade comes from. A picture of 50 steps takes three times as long."""


@pytest.mark.slow
@pytest.mark.parametrize("row", MIN_RIGHT)
def test_pictures_are_right_with_the_models_own_defaults(row):
    assert rates(drawing.grade for drawing in drawings_of(row, model_sampling(), NUM_PROMPTS)).right >= MIN_RIGHT[row]


@pytest.mark.slow
def test_pictures_are_right_with_stable_diffusions_defaults():
    drawings = drawings_of("held_out_triples", pndm_sampling(), NUM_PROMPTS_PNDM)
    assert rates(drawing.grade for drawing in drawings).right >= MIN_RIGHT_PNDM


@pytest.mark.slow
def test_the_safety_checker_fires_on_the_forbidden_shape():
    assert checker_report(drawings_of("forbidden", model_sampling(), NUM_PROMPTS))["flagged"] >= MIN_FLAGGED


@pytest.mark.slow
def test_the_safety_checker_leaves_everything_else_alone():
    assert checker_report(drawings_of("innocent", model_sampling(), NUM_PROMPTS))["flagged"] <= MAX_FALSE_ALARMS


def test_the_documented_grades_are_those_of_the_shipped_weights(engine):
    report = json.loads(GRADES.read_text())
    assert report["model_revision"] == engine.description.model_revision, "run `make grade`"
    page = PAGE.read_text()
    assert page_with(table(report), page) == page


def test_the_model_fits_into_the_package():
    from publish_demo_grades import MODEL

    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 15_000_000

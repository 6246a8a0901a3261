"""The seeds of rows, and what may not change while a job goes on."""

from __future__ import annotations

import pytest

from mii_serve.batch.rows import Row
from mii_serve.batch.seeds import seed_of_row
from mii_serve.batch.settings import JobSettings, check_unchanged
from mii_serve.errors import ConfigError
from mii_serve.types import RequestedParams


def row(row_id: str | None = None, **params: object) -> Row:
    return Row(id=row_id, params=RequestedParams(**{"prompt": "a", **params}))


def test_the_seed_of_a_row_is_the_same_on_any_machine():
    """Written down: a change of these would make other pictures of every job."""
    assert [seed_of_row(0, "0"), seed_of_row(0, "1"), seed_of_row(1, "0")] == [2893166218, 4011020074, 2791857979]


def test_a_row_keeps_its_own_seed_and_parameters_and_gets_the_jobs():
    settings = JobSettings(defaults={"num_inference_steps": 20, "negative_prompt": "b"}, seed=5)
    asked = settings.requested(row(seed=7, num_inference_steps=3), 12)
    assert (asked.seed, asked.num_inference_steps, asked.negative_prompt) == (7, 3, "b")
    assert settings.requested(row(), 12).seed == seed_of_row(5, "12")
    assert settings.requested(row("x"), 12).seed == settings.requested(row("x"), 99).seed == seed_of_row(5, "x")


def test_what_changed_is_named_with_its_old_and_its_new_value():
    before = JobSettings(defaults={"guidance_scale": 3.0}, seed=5).to_json()
    check_unchanged(before, before)
    for now, name in (
        (JobSettings(defaults={"guidance_scale": 4.0}, seed=5), "guidance_scale"),
        (JobSettings(defaults={"guidance_scale": 3.0, "height": 64}, seed=5), "height"),
        (JobSettings(seed=5), "guidance_scale"),
        (JobSettings(defaults={"guidance_scale": 3.0}, seed=6), "seed"),
    ):
        with pytest.raises(ConfigError, match=f"^{name}: this job was begun with"):
            check_unchanged(before, now.to_json())

"""Our table of MII's settings against the classes of deepspeed-mii 0.3.3, in an environment where those are installed."""

from __future__ import annotations

import json

import pytest
from outside import ROOT, run_client


@pytest.fixture(scope="module")
def told() -> dict:
    return json.loads(run_client("mii", "mii_settings.py", str(ROOT)).splitlines()[-1])


def test_the_table_has_every_setting_and_no_other(told):
    ours, theirs = told["names"]
    assert ours == theirs


def test_the_defaults_are_miis(told):
    assert {name: pair for name, pair in told["defaults"].items() if pair[0] != pair[1]} == {}


def test_both_accept_and_refuse_the_same(told):
    assert {case: pair for case, pair in told["verdicts"].items() if pair[0] != pair[1]} == {}
    assert {pair[0] for pair in told["verdicts"].values()} == {True, False}


def test_where_it_is_installed_it_is_asked(told):
    assert "deepspeed-mii has accepted the description" in told["log"]


def test_its_own_classes_name_the_setting(told):
    assert [problem and problem["setting"] for problem in told["checked"]] == [None, "dtype", "model"]

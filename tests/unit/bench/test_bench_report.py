"""A result as JSON, tables and comparison."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest
from bench_results import RIGHT, SETTINGS, UNKNOWN, WRONG, build, records
from rich.console import Console

from mii_serve.bench import result, tables
from mii_serve.bench.check import PictureCheck
from mii_serve.errors import ConfigError


def test_the_figures_are_those_of_the_records():
    figures = build().summary
    assert (figures["num_requests"], figures["num_ok"], figures["num_refused"], figures["num_failed"]) == (60, 53, 6, 1)
    assert figures["codes"] == {"INTERNAL": 1, "OK": 53, "RESOURCE_EXHAUSTED": 6}
    assert figures["seconds"] == pytest.approx(7.4)
    assert figures["requests_per_s"] == pytest.approx(53 / 7.4, rel=1e-4)
    good = sum(record.is_ok and record.total_s <= 1.0 for record in records())
    assert figures["goodput"]["requests_per_s"] == pytest.approx(good / 7.4, rel=1e-4)
    assert figures["goodput"]["share"] == pytest.approx(good / 60, rel=1e-4)
    assert figures["latency_s"]["first_preview"] is None
    assert figures["by_kind"]["z"]["num_requests"] == 30


def test_json_is_strict_and_reads_back(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(build().to_json())

    def refuse(constant: str):
        raise AssertionError(constant)

    loaded = json.loads(file.read_text(), parse_constant=refuse)
    assert loaded["check"]["pictures"][0]["psnr_db"] is None  # infinite: not one pixel differs
    again = result.read(file)
    assert again.records == build().records
    assert again.summary == build().summary


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": "mii_serve bench 0", "columns": []}', '{"format": "mii_serve bench 1"}']
)
def test_another_file_is_no_result(tmp_path, text):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"a\.json: is no"):
        result.read(file)


def test_a_load_without_a_single_answer_has_a_report(tmp_path):
    dead = [replace(record, code="UNAVAILABLE", queue_s=None, first_step_s=None) for record in records(count=12)]
    told = build(UNKNOWN, records=dead, observed={})
    assert told.summary["latency_s"]["total"] is None
    tables.show(told, Console(file=io.StringIO(), width=200))
    file = tmp_path / "a.json"
    file.write_text(told.to_json())
    assert result.read(file).summary["num_ok"] == 0
    assert build(UNKNOWN, records=[], observed={}).summary["num_requests"] == 0


def test_what_the_check_found_is_said_in_the_table():
    def table(check: PictureCheck) -> str:
        out = io.StringIO()
        tables.show(build(check), Console(file=out, width=200))
        return out.getvalue()

    assert "REJECTED: 1 of 1" in table(WRONG)
    assert "NOT CHECKED: --check 0" in table(UNKNOWN)
    assert "1 checked against the reference, all right, at most 0 levels" in table(RIGHT)
    assert build(WRONG).is_rejected
    assert not build(UNKNOWN).is_rejected


def test_compare_tells_a_difference_its_interval_and_what_else_differs():
    slower = build(total_s=1.5, settings={**SETTINGS, "seed": "1"})
    told = result.compare(build(), slower)
    assert told["unlike"] == ["seed: '0' and '1'"]
    by_name = {one["name"]: one for one in told["differences"]}
    assert by_name["total_p50"]["verdict"] == "higher"
    assert by_name["total_p50"]["change"] == pytest.approx(2.0)
    assert {one["verdict"] for one in result.compare(build(), build())["differences"]} == {"no difference shown"}
    out = io.StringIO()
    tables.differences(told, Console(file=out, width=200))
    assert re.search(r"total p50 +1 +3 +\+200.0 % .*higher", out.getvalue())


def test_compare_says_which_run_does_not_count():
    told = result.compare(build(WRONG), build(UNKNOWN))
    assert (told["rejected"], told["unchecked"]) == (["first"], ["second"])

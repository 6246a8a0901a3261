"""A result as JSON, tables, page and comparison."""

from __future__ import annotations

import io
import json
import re
import xml.dom.minidom
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from bench_results import RIGHT, SETTINGS, UNKNOWN, WRONG, made, records
from rich.console import Console

from mii_serve.bench import html, result, tables
from mii_serve.bench.check import Verdict
from mii_serve.bench.svg import MAX_DOTS, Plot, Series, thinned
from mii_serve.errors import ConfigError


def test_the_figures_are_those_of_the_records():
    figures = made().summary
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
    file.write_text(made().to_json())

    def refuse(constant: str):
        raise AssertionError(constant)

    loaded = json.loads(file.read_text(), parse_constant=refuse)
    assert loaded["check"]["pictures"][0]["psnr_db"] is None  # infinite: not one pixel differs
    again = result.read(file)
    assert again.records == made().records
    assert again.summary == made().summary


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
    told = made(UNKNOWN, records=dead, observed={})
    assert told.summary["latency_s"]["total"] is None
    tables.show(told, Console(file=io.StringIO(), width=200))
    html.page(told)
    file = tmp_path / "a.json"
    file.write_text(told.to_json())
    assert result.read(file).summary["num_ok"] == 0
    assert made(UNKNOWN, records=[], observed={}).summary["num_requests"] == 0
    html.page(made(UNKNOWN, records=[], observed={}))


class _Fetched(HTMLParser):
    """Whatever a browser would go and get, or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe", "object", "embed", "img"):
            self.found.append(tag)
        self.found += [name for name, _ in attrs if name in ("src", "href", "xlink:href") or name.startswith("on")]


@pytest.mark.parametrize("verdict", [RIGHT, WRONG, UNKNOWN])
def test_the_page_is_well_formed_and_needs_nothing_else(verdict):
    page = html.page(made(verdict))
    xml.dom.minidom.parseString(page.removeprefix("<!DOCTYPE html>\n"))
    parser = _Fetched()
    parser.feed(page)
    assert parser.found == []
    assert "url(" not in page
    assert "@import" not in page
    assert page.count("<svg") == 5
    assert "&lt;script&gt;alert(1)" in page
    assert "a &lt;b&gt; &amp; c" in page


def test_what_the_check_found_is_said_on_the_page_and_in_the_table():
    def table(verdict: Verdict) -> str:
        out = io.StringIO()
        tables.show(made(verdict), Console(file=out, width=200))
        return out.getvalue()

    assert "REJECTED: 1 of 1" in table(WRONG)
    assert "figures are worth nothing" in html.page(made(WRONG))
    assert "NOT CHECKED: --check 0" in table(UNKNOWN)
    assert "were not checked" in html.page(made(UNKNOWN))
    assert "1 checked against the reference, all right, at most 0 levels" in table(RIGHT)
    assert made(WRONG).is_rejected
    assert not made(UNKNOWN).is_rejected


def test_compare_tells_a_difference_its_interval_and_what_else_differs():
    slower = made(total_s=1.5, settings={**SETTINGS, "seed": "1"})
    told = result.compare(made(), slower)
    assert told["unlike"] == ["seed: '0' and '1'"]
    by_name = {one["name"]: one for one in told["differences"]}
    assert by_name["total_p50"]["verdict"] == "higher"
    assert by_name["total_p50"]["change"] == pytest.approx(2.0)
    assert {one["verdict"] for one in result.compare(made(), made())["differences"]} == {"no difference shown"}
    out = io.StringIO()
    tables.differences(told, Console(file=out, width=200))
    assert re.search(r"total p50 +1 +3 +\+200.0 % .*higher", out.getvalue())


def test_compare_says_which_run_does_not_count():
    told = result.compare(made(WRONG), made(UNKNOWN))
    assert (told["rejected"], told["unchecked"]) == (["first"], ["second"])


@pytest.mark.parametrize("points", [[], [(0.0, 0.0)], [(1.0, 5.0), (1.0, 5.0)], [(0.0, float("nan")), (1.0, 2.0)]])
@pytest.mark.parametrize("style", ["line", "dots", "bars", "marked"])
@pytest.mark.parametrize("log_y", [True, False])
def test_a_plot_of_little_is_a_plot(points, style, log_y):
    plot = Plot(title="a<b", x_label="&", y_label="y", series=[Series(name="s", points=points, style=style)], log_y=log_y)
    svg = plot.svg()
    xml.dom.minidom.parseString(svg)
    assert "nan" not in svg
    assert "inf" not in svg


def test_dots_are_thinned_evenly_and_keep_their_ends():
    points = [(float(i), 0.0) for i in range(100_000)]
    kept = thinned(points)
    assert len(kept) == MAX_DOTS
    assert (kept[0], kept[-1]) == (points[0], points[-1])

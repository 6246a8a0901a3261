"""A result as a page, and its plots."""

from __future__ import annotations

import re
import xml.dom.minidom
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from bench_results import RIGHT, UNKNOWN, WRONG, build, records

pytest.importorskip("matplotlib", reason="the page needs the extra bench")

from mii_serve.bench import html
from mii_serve.bench.plots import MAX_DOTS, draw, to_svg

pytestmark = pytest.mark.slow


class _Fetched(HTMLParser):
    """Whatever a browser would go and get, or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe", "object", "embed", "img"):
            self.found.append(tag)
        self.found += [name for name, _ in attrs if name == "src" or name.startswith("on")]
        links = [value or "" for name, value in attrs if name in ("href", "xlink:href")]
        self.found += [link for link in links if not link.startswith("#")]


@pytest.mark.parametrize("check", [RIGHT, WRONG, UNKNOWN])
def test_the_page_is_well_formed_and_needs_nothing_else(check):
    page = html.page(build(check))
    xml.dom.minidom.parseString(page.removeprefix("<!DOCTYPE html>\n"))
    parser = _Fetched()
    parser.feed(page)
    assert parser.found == []
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", page))
    assert "@import" not in page
    assert page.count("<svg") == 1
    for title in ("Share answered by then", "Each request", "Requests due and not ended", "Total by kind"):
        assert title in page
    assert "&lt;script&gt;alert(1)" in page
    assert "a &lt;b&gt; &amp; c" in page


@pytest.mark.parametrize("count", [1, 3])
def test_few_records_are_plotted(count):
    some = records(count=count)
    assert "<svg" in to_svg(draw(some, target_s=None))
    assert "<svg" in to_svg(draw([replace(record, code="INTERNAL") for record in some], target_s=1.0))


def test_a_kind_may_have_any_name_and_the_same_records_give_the_same_plots():
    odd = [replace(record, kind=r"$\frac 絵") for record in records()]
    assert r"$\frac 絵" in to_svg(draw(odd, target_s=1.0))
    assert to_svg(draw(odd, target_s=1.0)) == to_svg(draw(odd, target_s=1.0))


def test_a_load_of_any_length_has_a_page_of_bounded_size():
    many = records(count=3 * MAX_DOTS)
    assert to_svg(draw(many, target_s=None)).count("<use ") < 3 * MAX_DOTS


def test_what_the_check_found_is_on_the_page():
    assert "figures do not count" in html.page(build(WRONG))
    assert "were not checked" in html.page(build(UNKNOWN))


def test_a_load_without_a_single_answer_has_a_page():
    failed = [replace(record, code="UNAVAILABLE", queue_s=None, first_step_s=None) for record in records(count=12)]
    assert "<svg" in html.page(build(UNKNOWN, records=failed, observed={}))
    assert "<svg" not in html.page(build(UNKNOWN, records=[], observed={}))

"""Docs, help texts and metrics say the field's words: coined ones that the project once had do not come back."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mii_serve.cli.command_line import build_parser
from mii_serve.metrics import FrontMetrics, ReplicaMetrics

ROOT = Path(__file__).resolve().parents[2]
OTHER_PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md")
PAGES = sorted([*OTHER_PAGES, *(ROOT / "docs").rglob("*.md")])
COINED = re.compile(
    r"\b(?:at the (?:desk|door)|the (?:desk|ledger|guard|line)|in line|company|crowd|lattice|latent cells|pace|mended?|anew)\b"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_has_a_coined_word(page):
    text = re.sub(r"`[^`]*`", "", page.read_text())  # names of the code are what they are
    assert COINED.findall(text) == []


def help_texts(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield parser.description or ""
    for action in parser._actions:
        yield action.help or ""
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from help_texts(below)


def test_no_help_text_has_one():
    assert [text for text in help_texts(build_parser()) if COINED.search(text)] == []


def test_no_metric_has_one():
    families = [*FrontMetrics().registry.collect(), *ReplicaMetrics().registry.collect()]
    assert [family.name for family in families if COINED.search(family.documentation)] == []


def test_the_glossary_has_each_word_once():
    words = re.findall(r"^\| ([^|]+?) \|", (ROOT / "docs/architecture/00-glossary.md").read_text(), re.MULTILINE)[2:]
    each = [word for entry in words for word in entry.split(", ")]
    assert len(each) == len(set(each)) > 30

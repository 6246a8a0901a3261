"""What must be so before a release is made: version and changelog agree, and every package of the tested set has a known and
allowed licence.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.compile(r'^__version__ = "(\d+\.\d+\.\d+)"$', re.MULTILINE)
SECTION = re.compile(r"^## \[(Unreleased|\d+\.\d+\.\d+)\](?: - (\d{4}-\d{2}-\d{2}))?$", re.MULTILINE)
PERMISSIVE = re.compile(r"\b(apache|mit|bsd|isc|python|psf|mpl|zlib|unlicense|0bsd|public domain|hpnd|cnri)", re.IGNORECASE)
FORBIDDEN = re.compile(r"\b(agpl|affero|gpl|proprietary|commercial)", re.IGNORECASE)
"""Where no permissive licence is offered beside it."""


class ReleaseError(Exception):
    """A release cannot be made; the text says what to do."""


@dataclass(frozen=True)
class Section:
    """A section of the changelog; `date` is None while it is not released."""

    name: str
    date: str | None
    text: str


@dataclass(frozen=True)
class PackageLicence:
    name: str
    version: str
    licence: str

    @property
    def problem(self) -> str | None:
        """Why a person has to look at it; None where that is not needed."""
        if not self.licence:
            return f"{self.name} {self.version} does not say its licence"
        if FORBIDDEN.search(self.licence) and not PERMISSIVE.search(self.licence):
            return f"{self.name} {self.version} is under {self.licence}"
        return None


def version() -> str:
    found = VERSION.search((ROOT / "mii_serve" / "__init__.py").read_text())
    if found is None:
        raise ReleaseError("mii_serve/__init__.py: __version__ must be X.Y.Z")
    return found[1]


def sections() -> list[Section]:
    """Those of the changelog, newest first."""
    text = (ROOT / "CHANGELOG.md").read_text()
    found = list(SECTION.finditer(text))
    ends = [*(one.start() for one in found[1:]), len(text)]
    return [Section(one[1], one[2], text[one.end() : end].strip()) for one, end in zip(found, ends, strict=True)]


def section_of(number: str, *, is_draft: bool) -> Section:
    """The changelog's section of this version; of a draft, the one of what is not released yet.

    Raises:
        ReleaseError: they do not agree.
    """
    every = sections()
    released = [one for one in every if one.name != "Unreleased"]
    numbers = [_numbers(one.name) for one in released]
    if numbers != sorted(numbers, reverse=True) or len(set(numbers)) < len(numbers):
        raise ReleaseError("CHANGELOG.md: versions must be there once, the newest first")
    if undated := [one.name for one in released if one.date is None]:
        raise ReleaseError(f"CHANGELOG.md: {undated[0]} needs its date, as '## [{undated[0]}] - YYYY-MM-DD'")
    if numbers and numbers[0] > _numbers(number):
        raise ReleaseError(f"CHANGELOG.md has {released[0].name}, and mii_serve/__init__.py says {number}")
    waiting = next((one for one in every if one.name == "Unreleased" and one.text), None)
    if is_draft and waiting is not None:
        return waiting
    if not released or released[0].name != number:
        raise ReleaseError(f"CHANGELOG.md: what is under Unreleased must be under '## [{number}] - YYYY-MM-DD'")
    if waiting is not None:
        raise ReleaseError(f"CHANGELOG.md: Unreleased must be empty, or part of {number}")
    return released[0]


def pinned() -> dict[str, str]:
    """Name and version of every package of the tested set."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = (line.partition("==") for line in lines if line and not line.startswith("#"))
    return {name: number for name, _, number in pins}


def licences() -> Iterator[PackageLicence]:
    """Of the tested set, as it is installed for this Python; what is for another system is left out."""
    installed = {_normal(one.metadata["Name"]): one for one in importlib.metadata.distributions()}
    for name in pinned():
        if (found := installed.get(_normal(name))) is not None:
            yield PackageLicence(name, found.version, _licence_of(found))


def _licence_of(package: importlib.metadata.Distribution) -> str:
    """As the package says it: an SPDX expression, its classifiers, its own words, or the first line of its licence's file."""
    about = package.metadata
    if expression := about.get_all("License-Expression"):
        return str(expression[0])
    classifiers = [one.rpartition(" :: ")[2] for one in about.get_all("Classifier") or () if one.startswith("License :: ")]
    named = [one for one in classifiers if one != "OSI Approved"]
    words: str = ", ".join(named) or "".join(about.get_all("License") or ()).strip()
    for file in about.get_all("License-File") or () if not words else ():
        words = (package.read_text(f"licenses/{file}") or package.read_text(file) or "").strip()
    return words.partition("\n")[0][:80]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _numbers(number: str) -> tuple[int, ...]:
    return tuple(map(int, number.split(".")))

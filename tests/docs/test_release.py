"""What a release needs is there at any time: agreeing numbers, known licences, and all that the source distribution has."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import release
import release_checks
from release_checks import PackageLicence, ReleaseError

import mii_serve

ROOT = Path(__file__).resolve().parents[2]


def test_version_and_changelog_agree():
    assert release_checks.version() == mii_serve.__version__
    assert release_checks.section_of(mii_serve.__version__, is_draft=True).text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("## [Unreleased]\n\n## [1.2.0] - 2026-01-01\n- new\n", None),
        ("## [1.2.0] - 2026-01-01\n- new\n## [1.1.0] - 2025-01-01\n- old\n", None),
        ("## [Unreleased]\n- new\n", "must be under '## [1.2.0] - YYYY-MM-DD'"),
        ("## [Unreleased]\n- newer\n## [1.2.0] - 2026-01-01\n- new\n", "Unreleased must be empty"),
        ("## [1.2.0]\n- new\n", "needs its date"),
        ("## [1.3.0] - 2026-01-01\n- new\n", "has 1.3.0"),
        ("## [1.1.0] - 2026-01-01\n## [1.2.0] - 2025-01-01\n", "the newest first"),
    ],
)
def test_a_changelog_that_does_not_agree_ends_a_release(text, problem, tmp_path, monkeypatch):
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{text}")
    monkeypatch.setattr(release_checks, "ROOT", tmp_path)
    if problem is None:
        assert release_checks.section_of("1.2.0", is_draft=False).text == "- new"
    else:
        with pytest.raises(ReleaseError, match=re.escape(problem)):
            release_checks.section_of("1.2.0", is_draft=False)


def test_every_package_of_the_tested_set_has_a_licence_that_is_known_and_allowed():
    found = list(release_checks.licences())
    assert len(found) > 0.9 * len(release_checks.pinned())
    assert [one.problem for one in found if one.problem] == []
    for licence, is_allowed in (("", False), ("AGPL-3.0", False), ("GPL-2.0 OR MIT", True), ("BSD License", True)):
        assert (PackageLicence("x", "1", licence).problem is None) is is_allowed


def test_what_builds_a_release_is_pinned_and_of_the_tested_set_where_both_have_it():
    lines = [line for line in release.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert {"build", "hatchling", "cyclonedx-bom"} <= set(pins)
    assert {name: pins[name] for name in pins if name in release_checks.pinned()} == {
        name: release_checks.pinned()[name] for name in pins if name in release_checks.pinned()
    }
    assert version("build") == pins["build"]


def test_the_source_distribution_has_all_that_is_needed_to_go_on_from_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    for name in release.IN_SOURCE:
        assert (ROOT / name).is_file(), name
        top = "/" + name.partition("/")[0]
        assert name == "pyproject.toml" or any(fnmatch.fnmatch(top, pattern) for pattern in included), name

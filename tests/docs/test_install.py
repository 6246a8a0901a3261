"""What people are told of installing the package: never from an index, where it is not, and every extra by its name."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from mii_serve.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {".py", ".md", ".js", ".html", ".yaml", ".yml", ".sh", ".txt", ".toml", ""}
NAME = r"mii[-_]serve"
SELF_REFERENCE = re.compile(rf'^[a-z]+ = \["{NAME}\[(?:server|http)\]"|^    "{NAME}\[[a-z,]+\]",$')
"""How pyproject.toml says that one extra contains another."""


def told_wrongly(line: str) -> bool:
    """Whether it names the package, or an extra of it, as something that a package index has."""
    if SELF_REFERENCE.search(line):
        return False
    for found in re.finditer(rf"(?<![\w/.-]){NAME}(?P<extra>\[[a-z,]+\])?(?P<after>\s*@)?(?![\w./-])", line):
        installs = re.search(r"\b(?:pip3?|pipx|uv|conda|poetry) (?:install|add)\b[^;&`]*$", line[: found.start()])
        if (found["extra"] or installs) and not found["after"]:
            return True
    return False


@pytest.mark.parametrize(
    ("line", "is_wrong"),
    [
        ("pip install mii_serve", True),
        ("$ pip install -U 'mii-serve[http]'", True),
        ("it needs the extra mii-serve[azure]", True),
        ("uv add mii_serve", True),
        ("pip install './mii_serve-0.1.0-py3-none-any.whl[server]'", False),
        ("pip install 'mii_serve[server] @ git+https://host/mii_serve.git'", False),
        ("pip install -e '.[dev]'", False),
        ("install mii_serve with the extra http: see README, Install", False),
        ("pip install torch && mii_serve deploy", False),
    ],
)
def test_the_search_finds_what_it_is_for(line, is_wrong):
    assert told_wrongly(line) is is_wrong


def test_no_text_says_that_a_package_index_has_it():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout")
    wrong = []
    for name in filter(None, listed.stdout.split("\0")):
        file = ROOT / name
        if file.suffix not in TEXTS or not file.is_file() or file == Path(__file__).resolve():
            continue
        lines = enumerate(file.read_text().splitlines(), 1)
        wrong += [f"{name}:{number}: {line.strip()}" for number, line in lines if told_wrongly(line)]
    assert wrong == []


def install_section() -> str:
    (section,) = re.findall(r"^## Install\n(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return section


def test_the_readme_lists_every_extra():
    assert set(re.findall(r"^\| `(\w+)` \|", install_section(), re.MULTILINE)) == set(EXTRAS)


def test_extras_that_commands_name_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for names in re.findall(r"(?:\.whl|mii_serve|\.)\[([a-z,]+)\]['\" ]", page.read_text()):
            assert set(names.split(",")) <= {*EXTRAS, "dev"}, (page, names)

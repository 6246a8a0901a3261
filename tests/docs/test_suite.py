"""How the tests themselves are laid out."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
MODULES = sorted(file for file in TESTS.rglob("*.py") if TESTS / "support" not in file.parents)
"""All but the helpers."""

ARE_SCRIPTS = TESTS / "clients"
"""Programs for another Python than the one the tests run in."""


def imports(file: Path) -> set[str]:
    """The last parts of the modules it imports, inside of functions, too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found |= {name.rpartition(".")[2] for name in names}
    return found


def test_no_test_module_imports_another():
    names = {file.stem for file in MODULES}
    found = {str(file.relative_to(TESTS)): imports(file) & names for file in TESTS.rglob("*.py")}
    assert {name: others for name, others in found.items() if others} == {}


def test_helpers_are_in_support():
    misplaced = [
        str(file.relative_to(TESTS))
        for file in MODULES
        if file.name != "conftest.py" and not file.name.startswith("test_") and file.parent != ARE_SCRIPTS
    ]
    assert misplaced == []


def test_every_module_has_a_name_of_its_own():
    """pytest imports them by their file names alone."""
    count = Counter(file.name for file in TESTS.rglob("*.py") if file.name != "conftest.py")
    assert [name for name, number in count.items() if number > 1] == []


def test_a_folder_of_unit_tests_is_a_folder_of_the_package():
    package = TESTS.parent / "mii_serve"
    folders = {folder.relative_to(TESTS / "unit") for folder in (TESTS / "unit").rglob("*") if any(folder.glob("test_*.py"))}
    assert [str(folder) for folder in folders if not (package / folder).is_dir()] == []

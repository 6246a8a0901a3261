"""What is written down beside a measurement."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE_S

from mii_serve.bench import environment


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True, timeout=PATIENCE_S)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with this package in it."""
    for name in ("mii_serve/__init__.py", "benchmarks/script.py", "benchmarks/results/a.json", "docs/page.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    monkeypatch.setattr(environment.mii_serve, "__file__", str(tmp_path / "mii_serve/__init__.py"))
    return tmp_path


def test_the_commit_is_told_and_whether_the_files_are_its(checkout: Path):
    assert environment.commit() is None  # no repository
    git(checkout, "init", "-q")
    assert environment.commit() is None  # nothing of this package in it
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "c")
    clean = environment.commit()
    assert clean is not None
    assert len(clean) == 40
    for written in ("benchmarks/results/a.json", "docs/page.md"):
        (checkout / written).write_text("2\n")
    assert environment.commit() == clean
    (checkout / "benchmarks/script.py").write_text("2\n")
    assert environment.commit() == f"{clean}-dirty"


def test_the_command_can_be_typed_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["/x/mii_serve/__main__.py", "bench", "--mix", "1: height=8, width=8"])
    assert environment.command() == "mii_serve bench --mix '1: height=8, width=8'"
    monkeypatch.setattr(sys, "argv", ["benchmarks/peers.py"])
    assert environment.command() == "peers.py"


def test_all_that_is_needed_to_repeat_it_is_there():
    about = environment.circumstances(("numpy", "no-such-package"))
    assert set(about) == {"date", "commit", "command", "device", "versions"}
    assert set(about["versions"]) == {"mii_serve", "python", "numpy"}
    assert about["device"].endswith("cores")

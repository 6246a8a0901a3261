"""A draft of a release: built twice, installed where nothing is, drawn with."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import mii_serve

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("release")
    command = [sys.executable, str(ROOT / "tools" / "release.py"), "--draft", "--out", str(out)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return out


def test_every_file_of_a_release_is_made_and_has_its_checksum(made: Path) -> None:
    stem = f"mii_serve-{mii_serve.__version__}"
    endings = ("-py3-none-any.whl", ".tar.gz", ".cdx.json", "-licences.txt", "-notes.md")
    assert {file.name for file in made.iterdir()} == {f"{stem}{ending}" for ending in endings} | {"SHA256SUMS"}
    for line in (made / "SHA256SUMS").read_text().splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((made / name).read_bytes()).hexdigest() == digest


def test_the_bill_of_materials_names_what_the_wheel_was_tried_with(made: Path) -> None:
    bill = json.loads(next(made.glob("*.cdx.json")).read_text())
    assert bill["bomFormat"] == "CycloneDX" and bill["metadata"]["component"]["name"] == "mii-serve"
    named = {component["name"].lower(): component for component in bill["components"]}
    for name in ("torch", "diffusers", "grpcio", "starlette", "c2pa-python", "pillow"):
        assert named[name]["version"] and named[name]["licenses"], name
    assert "pytest" not in named and "mypy" not in named


def test_the_source_distribution_is_a_checkout_that_can_be_tested(made: Path, tmp_path: Path) -> None:
    with tarfile.open(next(made.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    [folder] = tmp_path.iterdir()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/docs/test_release.py",
        "tests/unit/test_series.py",
    ]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:]

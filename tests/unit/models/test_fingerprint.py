"""A fingerprint names content: it changes with any byte it covers and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from mii_serve.models import fingerprint as module
from mii_serve.models.fingerprint import fingerprint

SIZE = 5000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "w.safetensors").write_bytes(bytes(SIZE))
    (folder / "index.json").write_text("{}")
    return folder


def of(folder: Path) -> str:
    return fingerprint(folder, [path for path in folder.rglob("*") if path.is_file()])


def change(folder: Path, position: int) -> None:
    content = bytearray((folder / "unet" / "w.safetensors").read_bytes())
    content[position] ^= 1
    (folder / "unet" / "w.safetensors").write_bytes(content)


def test_it_is_sha256_and_twelve_digits_and_does_not_depend_on_the_place(folder: Path) -> None:
    name = of(folder)
    assert name.startswith("sha256:")
    assert len(name) == len("sha256:") + 12
    assert of(folder.rename(folder.with_name("b"))) == name


def test_it_changes_with_a_files_name(folder: Path) -> None:
    before = of(folder)
    (folder / "unet" / "w.safetensors").rename(folder / "unet" / "v.safetensors")
    assert of(folder) != before


def test_small_models_are_covered_to_the_last_byte(folder: Path) -> None:
    names = {of(folder)}
    for position in (0, SIZE // 2, SIZE - 1):
        change(folder, position)
        names.add(of(folder))
    assert len(names) == 4


def test_large_models_are_covered_by_size_and_the_edges_of_each_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WHOLE_LIMIT_BYTES", 1000)
    monkeypatch.setattr(module, "EDGE_BYTES", 100)
    before = of(folder)
    change(folder, SIZE // 2)
    assert of(folder) == before
    names = {before}
    for position in (99, SIZE - 100):
        change(folder, position)
        names.add(of(folder))
    with (folder / "unet" / "w.safetensors").open("ab") as stream:
        stream.write(b"\0")
    names.add(of(folder))
    assert len(names) == 4

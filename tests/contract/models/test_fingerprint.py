"""A model's revision changes with every file that its pictures are made from, and with no other."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mii_serve.models.check import check_folder
from mii_serve.models.defaults import DEFAULTS_FILE, defaults_files
from mii_serve.models.fingerprint import fingerprint, revision_of
from mii_serve.models.source import DEMO_FOLDER

SIZE = 5000
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "w.safetensors").write_bytes(bytes(SIZE))
    (folder / "index.json").write_text("{}")
    return folder


def of(folder: Path) -> str:
    return fingerprint(folder, [path for path in folder.rglob("*") if path.is_file()])


def change(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_it_is_sha256_and_twelve_digits_and_does_not_depend_on_the_place(folder: Path) -> None:
    name = of(folder)
    assert name.startswith("sha256:")
    assert len(name) == len("sha256:") + 12
    assert of(folder.rename(folder.with_name("b"))) == name


def test_it_changes_with_a_files_name(folder: Path) -> None:
    before = of(folder)
    (folder / "unet" / "w.safetensors").rename(folder / "unet" / "v.safetensors")
    assert of(folder) != before


def test_it_covers_every_byte(folder: Path) -> None:
    names = {of(folder)}
    for position in (0, SIZE // 2, SIZE - 1):
        change(folder / "unet" / "w.safetensors", position)
        names.add(of(folder))
    assert len(names) == 4


def test_a_change_in_the_middle_of_a_large_file_is_seen(tmp_path: Path) -> None:
    """As a fine-tune has it that leaves the first and the last layers as they were."""
    file = tmp_path / "large.safetensors"
    with file.open("wb") as stream:
        stream.truncate(80 * 2**20)
    before = of(tmp_path)
    with file.open("r+b") as stream:
        stream.seek(40 * 2**20)
        stream.write(b"\1")
    assert of(tmp_path) != before


# ---- a model's folder ----------------------------------------------------------------------------------------------


def add_what_others_have(model: Path) -> None:
    """Files that are not in the demo's folder and are in others."""
    tokenizer = model / "tokenizer"
    (tokenizer / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    (tokenizer / "added_tokens.json").write_text("{}")
    (tokenizer / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    (model / "feature_extractor" / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))


UNREAD = ("README.md", "unet/README.md", "tokenizer/LICENSE.txt", ".gitattributes", "v1-4.ckpt", "unet/old.json")
"""Files beside a model that nothing is loaded from."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(DEMO_FOLDER, copy)
    add_what_others_have(copy)
    for name in UNREAD:
        (copy / name).write_text("as it was")
    return copy


def revision(model: Path, commit: str | None = None) -> str:
    checked = check_folder(model, dtype="fp32")
    return revision_of(model, (*checked.files, *defaults_files(model)), commit)


def file_names(model: Path) -> list[str]:
    return sorted(path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file())


def test_every_file_that_pictures_are_made_from_changes_the_revision(model: Path) -> None:
    read = [name for name in file_names(model) if name not in UNREAD]
    assert {DEFAULTS_FILE, "model_index.json", "scheduler/scheduler_config.json", "vae/config.json"} < set(read)
    before = revision(model)
    assert revision(model) == before
    for name in read:
        content = (model / name).read_bytes()
        if name.endswith(".json"):
            (model / name).write_text(json.dumps({**json.loads(content), "an_option": True}))
        else:
            change(model / name, -1)
        assert revision(model) != before, f"{name} is not in the revision"
        (model / name).write_bytes(content)
        assert revision(model) == before


def test_a_file_that_comes_or_goes_changes_the_revision(model: Path) -> None:
    names = {revision(model)}
    for name in ("tokenizer/added_tokens.json", "tokenizer/special_tokens_map.json", "tokenizer/tokenizer.json", DEFAULTS_FILE):
        (model / name).unlink()
        names.add(revision(model))
    assert len(names) == 5


@pytest.mark.parametrize("name", UNREAD)
def test_other_files_do_not_change_the_revision(model: Path, name: str) -> None:
    before = revision(model)
    (model / name).write_text("changed")
    assert revision(model) == before


# ---- a folder of the hub's cache -----------------------------------------------------------------------------------


def git_name(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def snapshot(tmp_path: Path, model: Path) -> Path:
    """The model as the hub's client lays it out: weights are named by SHA-256, what is kept in git as git names it."""
    root = tmp_path / "models--org--name"
    for file in (path for path in model.rglob("*") if path.is_file()):
        content = file.read_bytes()
        blob = root / "blobs" / (sha256(content) if file.suffix == ".safetensors" else git_name(content))
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = root / "snapshots" / COMMIT / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return root / "snapshots" / COMMIT


def test_a_snapshot_as_it_was_fetched_is_named_by_its_commit(snapshot: Path) -> None:
    assert revision(snapshot, COMMIT) == COMMIT


def replace_the_link(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


def write_through_the_link(file: Path, content: bytes) -> None:
    file.write_bytes(content)


@pytest.mark.parametrize("edit", [replace_the_link, write_through_the_link])
@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "vae/diffusion_pytorch_model.safetensors"])
def test_a_snapshot_that_was_edited_is_not(snapshot: Path, name: str, edit: Callable[[Path, bytes], None]) -> None:
    edit(snapshot / name, (snapshot / name).read_bytes()[:-1] + b" ")
    found = unchecked_revision(snapshot)
    assert found.startswith(f"{COMMIT}+sha256:")


def unchecked_revision(snapshot: Path) -> str:
    """Without a look at whether what was edited is still sound."""
    files = [path for path in snapshot.rglob("*") if path.is_file() and path.relative_to(snapshot).as_posix() not in UNREAD]
    return revision_of(snapshot, files, COMMIT)


def test_defaults_added_to_a_snapshot_are_in_its_name(snapshot: Path) -> None:
    (snapshot / DEFAULTS_FILE).unlink()
    assert revision(snapshot, COMMIT) == COMMIT
    (snapshot / DEFAULTS_FILE).write_text(json.dumps({"num_inference_steps": 3}))
    first = revision(snapshot, COMMIT)
    (snapshot / DEFAULTS_FILE).write_text(json.dumps({"num_inference_steps": 4}))
    assert len({COMMIT, first, revision(snapshot, COMMIT)}) == 3


def test_a_copy_of_a_snapshot_without_links_proves_nothing(snapshot: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copied"
    shutil.copytree(snapshot, copy)
    assert revision(copy, COMMIT) == f"{COMMIT}+{revision(copy)}"

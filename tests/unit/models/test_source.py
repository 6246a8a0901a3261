"""What the operator calls a model leads to one folder, one name, and a commit where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mii_serve.errors import ModelError
from mii_serve.models import source
from mii_serve.models.source import FoundModel, find_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def find(model: str | Path, revision: str | None = None) -> FoundModel:
    return find_model(str(model), revision=revision, dtype="fp32", allow_pickle=False, enable_safety_checker=True)


def refused(model: str | Path, revision: str | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        find(model, revision)
    return str(caught.value)


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Notes what is asked of the hub, which answers everything."""
    asked: list[tuple[str, str | None]] = []

    def fetch(repo: str, revision: str | None, **_: Any) -> tuple[Path, str]:
        asked.append((repo, revision))
        return Path("cache"), COMMIT

    monkeypatch.setattr("mii_serve.models.hub.fetch", fetch)
    return asked


def test_demo_is_the_model_in_the_package_even_beside_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = make_model(tmp_path / "demo")
    packaged = make_model(tmp_path / "package")
    monkeypatch.setattr(source, "DEMO_FOLDER", packaged)
    assert find("demo") == FoundModel(name="demo", folder=packaged)
    assert find("./demo") == FoundModel(name="demo", folder=own)


def test_a_missing_demo_model_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "DEMO_FOLDER", tmp_path / "nowhere")
    assert "missing from this installation" in refused("demo")


def test_a_local_folder_is_called_by_its_name(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "my-model")
    assert find(folder) == find("my-model") == find("./my-model/") == FoundModel(name="my-model", folder=folder)


def test_an_existing_path_wins_over_a_hub_id(tmp_path: Path, hub: list[tuple[str, str | None]]) -> None:
    folder = make_model(tmp_path / "org" / "name")
    assert find("org/name") == FoundModel(name="name", folder=folder)
    assert hub == []


@pytest.mark.parametrize(
    ("model", "revision", "asked"),
    [
        ("org/name", None, ("org/name", None)),
        ("org/name", "fp16", ("org/name", "fp16")),
        ("org/name@v1.0", None, ("org/name", "v1.0")),
        ("org/name@refs/pr/3", "refs/pr/3", ("org/name", "refs/pr/3")),
        ("CompVis/stable-diffusion-v1-4", None, ("CompVis/stable-diffusion-v1-4", None)),
    ],
)
def test_a_hub_id_may_carry_its_revision(
    hub: list[tuple[str, str | None]], model: str, revision: str | None, asked: tuple[str, str | None]
) -> None:
    assert find(model, revision) == FoundModel(name=asked[0], folder=Path("cache"), commit=COMMIT)
    assert hub == [asked]


def test_two_different_revisions_are_refused() -> None:
    assert "different revisions" in refused("org/name@a", "b")


@pytest.mark.parametrize(
    "model",
    ["/no/such", "./no/such", "../such", "nowhere", "a/b/c", "~/no-such-model", "~no-such-user/model", "x" * 300, "a\\b"],
)
def test_a_path_that_is_not_there_is_told(model: str) -> None:
    message = refused(model)
    assert f"there is no folder {model}" in message
    assert "org/name" in message


def test_a_revision_of_a_local_folder_is_refused(tmp_path: Path) -> None:
    assert "revision main is of no use" in refused(make_model(tmp_path / "m"), "main")


@pytest.mark.parametrize("name", ["v1.5-pruned.safetensors", "v1.5-pruned.ckpt"])
def test_a_file_of_weights_is_a_model_of_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert find(name) == FoundModel(name="v1.5-pruned", folder=tmp_path, file=tmp_path / name)
    assert "revision main is of no use" in refused(name, "main")


def test_any_other_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert "neither a model folder nor a file of weights (.safetensors, .ckpt" in refused("notes.txt")


def test_the_index_instead_of_its_folder_is_told(tmp_path: Path) -> None:
    assert "Give the folder" in refused(make_model(tmp_path / "m") / "model_index.json")


def test_a_snapshot_in_a_hub_cache_knows_its_id_and_commit(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "models--org--na-me" / "snapshots" / COMMIT)
    expected = FoundModel(name="org/na-me", folder=folder, commit=COMMIT)
    assert find(folder) == find(folder, COMMIT) == expected
    assert COMMIT in refused(folder, "main")


def test_a_link_to_a_snapshot_keeps_its_commit(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "snapshots" / COMMIT)
    (tmp_path / "current").symlink_to(folder)
    assert find("current") == FoundModel(name="current", folder=tmp_path / "current", commit=COMMIT)


@pytest.mark.parametrize(
    "given", ["sd-v1-4/12", "sd-v1-4/12/mlflow_model_folder", "sd-v1-4/12/mlflow_model_folder/artifacts/INPUT_model_path"]
)
def test_an_azure_model_folder_is_found_from_any_of_its_levels(tmp_path: Path, given: str) -> None:
    mlflow_folder = tmp_path / "sd-v1-4" / "12" / "mlflow_model_folder"
    inner = make_model(mlflow_folder / "artifacts" / "INPUT_model_path")
    (mlflow_folder / "MLmodel").touch()
    assert find(tmp_path / given) == FoundModel(name="sd-v1-4", folder=inner)


def test_a_diffusers_folder_is_itself_whatever_lies_in_it(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    make_model(folder / "artifacts" / "INPUT_model_path")
    (folder / "MLmodel").touch()
    assert find(folder).folder == folder


@pytest.mark.parametrize(
    "inner", ["model", "artifacts", "artifacts/stable-diffusion", "mlflow_model_folder/artifacts/data/sd", "sd/artifacts/model"]
)
def test_a_folder_of_another_name_below_artifacts_or_one_down_is_found(tmp_path: Path, inner: str) -> None:
    folder = make_model(tmp_path / "sd-v2" / "1" / inner)
    make_model(tmp_path / "sd-v2" / "1" / ".cache")
    assert find("sd-v2/1") == FoundModel(name="sd-v2", folder=folder)


def test_several_models_in_a_folder_are_all_named(tmp_path: Path) -> None:
    first, second = make_model(tmp_path / "m" / "a"), make_model(tmp_path / "m" / "b")
    assert f"holds several models: {first}, {second}. Give one of them" in refused("m")


def test_an_mlflow_model_without_a_diffusers_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "MLmodel").touch()
    assert "INPUT_model_path" in refused(tmp_path)

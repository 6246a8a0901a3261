"""From the operator's setting `model` to a folder, a name and, where it is known, a hub commit.

The rules of naming are in the package's docstring. Nothing is inspected here beyond what finding takes.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mii_serve.errors import ModelError
from mii_serve.models import DEMO, RANDOM_SD_V1_4
from mii_serve.models.hints import MODEL_INDEX
from mii_serve.models.single_file.files import ENDINGS

if TYPE_CHECKING:
    from mii_serve.models import Precision

DEMO_FOLDER = Path(__file__).parent / "demo"

_AZURE_FOLDER = "mlflow_model_folder"
_AZURE_INNER = Path("artifacts") / "INPUT_model_path"
_AZURE_MARK = "MLmodel"
_ARTIFACTS = ("artifacts/", "artifacts/*/", "artifacts/*/*/")
_PLACES = ("*/", *_ARTIFACTS, *(f"*/{place}" for place in _ARTIFACTS))
"""Where else a model may lie in the folder that is given."""
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CACHE_FOLDER = re.compile(r"models--(?P<org>[\w.-]+?)--(?P<name>[\w.-]+)", re.ASCII)


_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundModel:
    """`commit` is the hub's, None where it is not known. `file` is set where the model is a single file in the folder."""

    name: str
    folder: Path
    commit: str | None = None
    file: Path | None = None


def find_model(
    model: str, *, revision: str | None, dtype: Precision, allow_pickle: bool, enable_safety_checker: bool
) -> FoundModel:
    """Find the folder, fetching it from the hub where it must be.

    Raises:
        ModelError
    """
    if model == DEMO:
        _refuse_revision(model, revision)
        if not DEMO_FOLDER.is_dir():
            raise ModelError(f"the demo model is missing from this installation ({DEMO_FOLDER}). Install mii_serve again")
        return FoundModel(name=DEMO, folder=DEMO_FOLDER)
    path = _existing(model)
    if path is not None:
        return _local(path, revision)
    match = _HUB_ID.fullmatch(model)
    if match is None or model.startswith("."):
        raise ModelError(
            f"there is no folder {model} (looked in {Path.cwd()}), and it is not a hub id of the form org/name."
            f" Give a folder, a hub id, {DEMO} or {RANDOM_SD_V1_4}"
        )
    if revision is not None and match["revision"] not in (None, revision):
        raise ModelError(f"{model} and revision {revision} name different revisions. Give one of them")
    from mii_serve.models.hub import fetch

    folder, commit = fetch(
        match["repo"],
        match["revision"] or revision,
        dtype=dtype,
        allow_pickle=allow_pickle,
        enable_safety_checker=enable_safety_checker,
    )
    return FoundModel(name=match["repo"], folder=folder, commit=commit)


def _existing(model: str) -> Path | None:
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # a name no file system takes, or the home of a user that is not there
        return None


def _refuse_revision(model: str, revision: str | None) -> None:
    if revision is not None:
        raise ModelError(f"revision {revision} is of no use: {model} is not from the hub. Leave it out")


def _local(path: Path, revision: str | None) -> FoundModel:
    path = path.absolute()
    if not path.is_dir():
        if path.name == MODEL_INDEX:
            raise ModelError(f"{path} is a file. Give the folder it is in")
        if path.suffix not in ENDINGS:
            raise ModelError(f"{path} is neither a model folder nor a file of weights ({', '.join(ENDINGS)})")
        _refuse_revision(str(path), revision)
        return FoundModel(name=path.stem, folder=path.parent, file=path)
    folder = _model_folder(path)
    resolved = folder.resolve()
    if resolved.parent.name == "snapshots" and _COMMIT.fullmatch(resolved.name):
        if revision not in (None, resolved.name):
            raise ModelError(f"{path} is commit {resolved.name}, not revision {revision}. Leave the revision out")
        cached = _CACHE_FOLDER.fullmatch(resolved.parent.parent.name)
        name = f"{cached['org']}/{cached['name']}" if cached else path.name
        return FoundModel(name=name, folder=folder, commit=resolved.name)
    _refuse_revision(str(path), revision)
    return FoundModel(name=_name(path), folder=folder)


def _model_folder(path: Path) -> Path:
    """The diffusers folder in an Azure ML or MLflow model folder, or one folder down; where there is none, the path as it is.

    Raises:
        ModelError: there are several, or an MLflow model has none.
    """
    if (path / MODEL_INDEX).exists():
        return path
    for mlflow_folder in (path, path / _AZURE_FOLDER):
        if (mlflow_folder / _AZURE_INNER).is_dir():
            return mlflow_folder / _AZURE_INNER
    found = sorted({index.parent for place in _PLACES for index in path.glob(f"{place}{MODEL_INDEX}")})
    found = [folder for folder in found if not any(name.startswith(".") for name in folder.relative_to(path).parts)]
    if len(found) > 1:
        raise ModelError(f"{path} holds several models: {', '.join(map(str, found))}. Give one of them")
    if found:
        _logger.info("the model is in %s", found[0])
        return found[0]
    for mlflow_folder in (path, path / _AZURE_FOLDER):
        if (mlflow_folder / _AZURE_MARK).exists():
            raise ModelError(
                f"{mlflow_folder} is an MLflow model ({_AZURE_MARK}) without {_AZURE_INNER}/, where the diffusers files"
                f" should be; no {MODEL_INDEX} is elsewhere below artifacts/ or one folder down either. Register or download"
                " the model again, or give the diffusers folder itself"
            )
    return path


def _name(path: Path) -> str:
    """The folder's name; in an Azure ML mount (`<model>/<version>/mlflow_model_folder/…`) the model's."""
    inner = {_AZURE_FOLDER, *_AZURE_INNER.parts}
    while path.name in inner and path.parent != path:
        path = path.parent
    if path.name.isdecimal() and path.parent.name:
        path = path.parent
    return path.name or "model"

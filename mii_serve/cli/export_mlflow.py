"""`mii_serve export-mlflow`: a model folder as an MLflow model, with the code that makes its pictures and without a pickle.

MLflow copies the diffusers folder, this package (without the built-in model) and a script into the folder. The signature is
that of the text-to-image models of Azure's catalog, with the parameters beside it.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mii_serve.config import LimitsConfig
from mii_serve.errors import ConfigError, InvalidRequestError
from mii_serve.models.check import check_folder
from mii_serve.models.defaults import read_defaults, settle
from mii_serve.models.source import DEMO_FOLDER, FoundModel, find_model
from mii_serve.types import PARAMETERS

ARTIFACT = "model_dir"
FOLDER = "INPUT_model_path"
"""As in Azure's catalog, so that `mii_serve deploy` takes the export, too."""
PACKAGE = Path(__file__).resolve().parents[1]
ENTRY = PACKAGE / "replica" / "pyfunc_entry.py"
PICKLED = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl", "*.msgpack", "*.h5", "*.onnx", "*.onnx_data")
"""Weights in formats that are not used; some can run code."""
EXTRA = "mlflow"
KINDS = {str: "string", int: "long", float: "double"}


def run(model: str, target: Path) -> int:
    """Write the model and print where it is.

    Raises:
        InvalidRequestError: something is at `target`.
        ModelError: the model cannot be found or served.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidRequestError("DIR", "must be new or empty", str(target))
    found = find_model(model, revision=None, dtype="fp32", allow_pickle=False, enable_safety_checker=True)
    check_folder(found.folder, dtype="fp32")
    with tempfile.TemporaryDirectory(prefix="mii_serve-export-") as name:
        _save(found, Path(name), target)
    print(target)
    return 0


def _save(found: FoundModel, staging: Path, target: Path) -> None:
    weights, code = staging / FOLDER, staging / PACKAGE.name
    shutil.copytree(found.folder, weights, copy_function=_link, ignore=shutil.ignore_patterns(*PICKLED, ".*"))
    shutil.copytree(PACKAGE, code, ignore=shutil.ignore_patterns("__pycache__", DEMO_FOLDER.name))
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # it wants type hints and an example to run
        _write(found, weights, code, target)


def _write(found: FoundModel, weights: Path, code: Path, target: Path) -> None:
    from mlflow.pyfunc import save_model

    save_model(
        target,
        python_model=str(ENTRY),
        artifacts={ARTIFACT: str(weights)},
        code_paths=[str(code)],
        signature=_signature(found),
        pip_requirements=list(requirements()),
        metadata={"base_model_name": found.name, "base_model_task": "text-to-image", "model_type": "stable-diffusion"},
    )


def _link(source: str, target: str) -> None:
    """Gigabytes are not copied twice where one link will do."""
    try:
        os.link(Path(source).resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def _signature(found: FoundModel) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    outputs = [("string", "prompt"), ("binary", "generated_image"), ("boolean", "nsfw_content_detected")]
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt", required=True)]),
        outputs=Schema([ColSpec(DataType[kind], name) for kind, name in outputs]),
        params=ParamSchema([ParamSpec(name, kind, default) for name, kind, default in parameters(found.folder)]),
    )


def parameters(folder: Path) -> Iterator[tuple[str, str, Any]]:
    """The parameters of a call: names, MLflow's types, and the model's own defaults; None is left to the model."""
    defaults, _ = settle(read_defaults(folder), LimitsConfig(), sample_size=None)
    for parameter in PARAMETERS:
        if parameter.name == "prompt":
            continue
        is_stated = parameter.name in ("num_inference_steps", "guidance_scale")
        default = parameter.default_in(defaults) if is_stated else parameter.default
        yield parameter.name, KINDS[parameter.kind], default


def requirements() -> Iterator[str]:
    """What the code in the model needs, in the versions that are installed here.

    Raises:
        ConfigError: this package was not installed, so it does not know.
    """
    try:
        declared = importlib.metadata.requires("mii-serve") or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("export-mlflow", "mii_serve must be installed, so that its requirements are known") from None
    for line in declared:
        name, _, marker = line.partition(";")
        extras = re.findall(r"extra == ['\"](\w+)['\"]", marker)
        distribution = re.split(r"[\[<>=!~ (]", name, maxsplit=1)[0]
        if distribution != "mii-serve" and (not extras or set(extras) & {"server", EXTRA}):
            version = importlib.metadata.version(distribution).partition("+")[0]  # "+cpu" is a build of this machine
            yield f"{distribution}=={version}"

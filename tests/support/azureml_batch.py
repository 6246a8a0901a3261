"""The scripts of an Azure ML batch deployment as modules, and inputs as the notebooks of Azure's catalog prepare them."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from outside import ROOT

FOLDER = ROOT / "deployment" / "azureml"
NOTEBOOK_PROMPTS = (
    "a photo of an astronaut riding a horse on mars",
    "A majestic lion jumping over a big stone at night",
    "Monsoon arriving in rain forest",
)
VIOLENT = "dead body killed with a big dagger"
SAFE_NOTEBOOK_PROMPTS = (
    "a photo of an astronaut riding a horse on mars",
    "A majestic lion jumping from a big stone at night",
    VIOLENT,
    "Good weather to play and have fun",
)


def script(name: str) -> ModuleType:
    """A script of deployment/azureml; it is in no package."""
    if (loaded := sys.modules.get(name)) is not None:
        return loaded
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_csv(path: Path, prompts: Sequence[str], first: int = 0, **columns: object) -> Path:
    """A file as pandas writes a part of a frame: with the frame's index as a first column that has no name."""
    more: Mapping[str, object] = columns
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["", "prompt", *more])
        writer.writerows([first + number, prompt, *more.values()] for number, prompt in enumerate(prompts))
    return path


def prepared(folder: Path, prompts: Sequence[str], **columns: object) -> list[Path]:
    """Files of two prompts each, with the names that the notebook gives them."""
    folder.mkdir(exist_ok=True)
    parts = range(0, len(prompts), 2)
    return [write_csv(folder / f"{first}batch_input.csv", prompts[first : first + 2], first, **columns) for first in parts]

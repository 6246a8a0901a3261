"""A function of the user's own that judges pictures: `module:function`, or `file.py:function`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from mii_serve.errors import InvalidRequestError

Grade = Callable[[Mapping[str, Any], Image.Image], Mapping[str, Any]]
"""Given a line of the index with the members of the prompt's row, and the picture: figures and truths by name."""
OPTION = "--grader"


def load_grader(name: str) -> Grade:
    """Import the function. A module is looked for on PYTHONPATH and among what is installed, not in the current folder.

    Raises:
        InvalidRequestError: there is no such module or function.
    """
    place, colon, function_name = name.rpartition(":")
    if not colon or not place or not function_name:
        raise InvalidRequestError(OPTION, "must be module:function or file.py:function", repr(name))
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (ImportError, OSError) as error:
        raise InvalidRequestError(OPTION, f"{place} cannot be imported: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InvalidRequestError(OPTION, f"{place} has no function {function_name}")
    grade: Grade = function
    return grade


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses look for the module of their annotations
    spec.loader.exec_module(module)
    return module


def graded(grade: Grade, line: Mapping[str, Any], path: Path) -> dict[str, float]:
    """What the function says of one picture.

    Raises:
        InvalidRequestError: it says something that is no number.
    """
    with Image.open(path) as picture:
        found = grade(line, picture.convert("RGB"))
    figures: dict[str, float] = {}
    for name, value in found.items():
        if not isinstance(value, bool | int | float):
            raise InvalidRequestError(OPTION, f"says {name} is {type(value).__name__}; must be a bool or a number")
        figures[str(name)] = float(value)
    return figures

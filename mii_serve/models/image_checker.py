"""The safety checker of a model by itself, for those who want its image embeddings. Imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mii_serve.errors import ModelError
from mii_serve.models.check import CheckedFolder, check_folder
from mii_serve.models.fingerprint import fingerprint
from mii_serve.models.loading import check_device, load_part
from mii_serve.models.quiet import quiet_libraries
from mii_serve.models.source import find_model

PARTS = ("safety_checker", "feature_extractor")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageChecker:
    """`revision` is a fingerprint of the files of these two parts."""

    model: str
    revision: str
    safety_checker: Any = field(repr=False)
    feature_extractor: Any = field(repr=False)


def load_image_checker(model: str, *, device: str) -> ImageChecker:
    """Load the safety checker of a model in fp32, and nothing else of it.

    Raises:
        ModelError: there is no such model, or it has no safety checker.
        ConfigError: the device is not there.
    """
    on_device = check_device(device)
    with quiet_libraries():
        found = find_model(model, revision=None, dtype="fp32", allow_pickle=False, enable_safety_checker=True)
        if found.file is not None:
            raise ModelError(f"{found.name} is a single file, which has no safety checker; name a model in a folder")
        checked: CheckedFolder = check_folder(found.folder, dtype="fp32")
        if any(name not in checked.parts for name in PARTS):
            raise ModelError(f"{found.name} has no safety checker, so there are no embeddings of it")
        parts = {name: load_part(checked.parts[name], dtype="fp32", device=on_device) for name in PARTS}
    files = [file for name in PARTS for file in checked.parts[name].files]
    return ImageChecker(model=found.name, revision=fingerprint(found.folder, files), **parts)

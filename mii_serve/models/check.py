"""Inspects a diffusers folder before anything of it is loaded: is it complete, is it intact, can we serve it?

Reads JSON and file headers, a few kilobytes in all, and imports neither torch nor diffusers. What only shows when tensors
are read (wrong shapes, missing tensors) is left to `loading.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mii_serve.errors import ModelError
from mii_serve.models.architecture import check_architecture, check_vae
from mii_serve.models.hints import INTERRUPTED, MODEL_INDEX, has_unfinished_download, hint_for
from mii_serve.models.weights import MODEL_PARTS, Weights, check_not_a_pointer, find_weights

if TYPE_CHECKING:
    from mii_serve.models import Precision

PIPELINE = "StableDiffusionPipeline"
PIPELINES = frozenset(
    {
        PIPELINE,
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionInpaintPipelineLegacy",
        "StableDiffusionPAGPipeline",
        "StableDiffusionPanoramaPipeline",
        "StableDiffusionPipelineSafe",
        "StableDiffusionSAGPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
    }
)
"""Those with the parts of a `StableDiffusionPipeline`, with which all of them can turn text into pictures."""

_IMAGE_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
_KNOWN_CLASSES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL", "AutoencoderTiny")),
    "text_encoder": ("transformers", ("CLIPTextModel",)),
    "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
    "scheduler": ("diffusers", ()),  # any class that ends so
    "safety_checker": ("stable_diffusion", ("StableDiffusionSafetyChecker",)),
    "feature_extractor": ("transformers", _IMAGE_PROCESSORS),
}
_OPTIONAL = ("safety_checker", "feature_extractor")
_CONFIG_FILES = {
    "scheduler": "scheduler_config.json",
    "feature_extractor": "preprocessor_config.json",
}
_ALTERNATIVE_CONFIG_FILES = {"feature_extractor": ("processor_config.json",)}
"""Read before the usual one, where they are there."""
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
TOKENIZER_OPTIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SAFE_CHECKER = ["stable_diffusion_safe", "SafeStableDiffusionSafetyChecker"]
"""Has the tensors of a `StableDiffusionSafetyChecker`, and is loaded as one: it blackens pictures."""


_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A folder of the pipeline: its class, and the files it is loaded from."""

    name: str
    class_name: str
    folder: Path
    weights: Weights | None
    files: tuple[Path, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedFolder:
    """A pipeline's folder that is complete. An optional part that is not used is not in `parts`."""

    folder: Path
    parts: Mapping[str, Part]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.folder / MODEL_INDEX, *(file for part in self.parts.values() for file in part.files))


def check_folder(
    folder: Path, *, dtype: Precision, allow_pickle: bool = False, enable_safety_checker: bool = True
) -> CheckedFolder:
    """Inspect the folder.

    Raises:
        ModelError: the first thing found wrong, where it is, and what to do.
    """
    classes, unused = _read_index(folder)
    if unused:
        _logger.warning("%s: not used, and not loaded: %s", folder, ", ".join(unused))
    if not enable_safety_checker or "safety_checker" not in classes:
        classes = {name: known for name, known in classes.items() if name not in _OPTIONAL}
    for leftover in (*folder.glob("*.incomplete"), *folder.glob("[!.]*/*.incomplete")):
        raise ModelError(f"{leftover}: {INTERRUPTED}")
    for name in classes:
        if not (folder / name).is_dir():
            hint = INTERRUPTED if has_unfinished_download(folder) else "Fetch or copy the model again"
            raise ModelError(f"{folder} has no folder {name}/, which its {MODEL_INDEX} names. {hint}")
    configs = {
        name: read_json(folder / name / _CONFIG_FILES.get(name, "config.json")) for name in classes if name != "tokenizer"
    }
    check_architecture(configs, str(folder))
    parts = {}
    for name, class_name in classes.items():
        weights = None
        if name in MODEL_PARTS:
            weights = find_weights(folder / name, name, dtype, allow_pickle=allow_pickle)
            if weights.is_pickle and not allow_pickle:
                _logger.warning("%s: the %s is a pickle, and is read without running code", folder, name)
        parts[name] = Part(
            name=name,
            class_name=class_name,
            folder=folder / name,
            weights=weights,
            files=(*_config_files(folder / name, name), *(weights.all_files if weights else ())),
        )
    return CheckedFolder(folder=folder, parts=parts)


def read_model_index(folder: Path) -> dict[str, str]:
    """The classes of the parts the pipeline has, by part; optional parts that are null are left out.

    Raises:
        ModelError: no such file, another pipeline, or a class that is not one of a `StableDiffusionPipeline`.
    """
    return _read_index(folder)[0]


def _read_index(folder: Path) -> tuple[dict[str, str], list[str]]:
    """The classes, and the parts that a `StableDiffusionPipeline` does not use to turn text into pictures."""
    index = folder / MODEL_INDEX
    if not index.is_file():
        raise ModelError(f"{folder} has no {MODEL_INDEX}, so it is not a diffusers model folder. {hint_for(folder)}")
    entries = read_json(index)
    pipeline = entries.pop("_class_name", None)
    if pipeline not in PIPELINES:
        raise ModelError(
            f"{index} is of a {pipeline}; only {PIPELINE} is supported, that is text to image with Stable Diffusion v1 and v2,"
            " and other pipelines with the same parts"
        )
    parts = {name: entry for name, entry in entries.items() if isinstance(entry, list) and entry[:1] not in ([], [None])}
    classes = {name: _known_class(index, name, entry) for name, entry in parts.items() if name in _KNOWN_CLASSES}
    unused = [name for name, entry in parts.items() if name not in _KNOWN_CLASSES and all(isinstance(e, str) for e in entry)]
    for name in _KNOWN_CLASSES:
        if name not in classes and name not in _OPTIONAL:
            raise ModelError(f"{index} names no {name}, which a {PIPELINE} needs. Fetch or copy the model again")
    if "safety_checker" in classes and "feature_extractor" not in classes:
        raise ModelError(
            f"{index} names a safety_checker but no feature_extractor, which it needs. Add one, or turn the checker off"
            " (enable_safety_checker)"
        )
    return classes, unused


def check_vae_folder(folder: Path, *, dtype: Precision, allow_pickle: bool) -> Part:
    """A VAE in a folder of its own, as `save_pretrained` leaves it.

    Raises:
        ModelError
    """
    config = read_json(folder / "config.json")
    known = _KNOWN_CLASSES["vae"][1]
    if (class_name := config.get("_class_name")) not in known:
        raise ModelError(f"{folder} is a {class_name}; expected a VAE, that is {' or '.join(known)}")
    check_vae(config, str(folder))
    weights = find_weights(folder, "vae", dtype, allow_pickle=allow_pickle)
    files = (folder / "config.json", *weights.all_files)
    return Part(name="vae", class_name=class_name, folder=folder, weights=weights, files=files)


def _known_class(index: Path, name: str, entry: list[Any]) -> str:
    library, classes = _KNOWN_CLASSES[name]
    if name == "safety_checker" and entry == _SAFE_CHECKER:
        return classes[0]
    match entry:
        case [found_library, str(class_name)] if found_library == library:
            if class_name in classes or (name == "scheduler" and class_name.endswith("Scheduler")):
                return class_name
    expected = " or ".join(classes) or "a scheduler class"
    raise ModelError(
        f"{index}: {name} is {'.'.join(map(str, entry))}, expected {library}.{expected}. Code that comes with a model is"
        " never run"
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError
    """
    if not file.is_file():
        raise ModelError(f"there is no {file}. Fetch or copy the model again")
    check_not_a_pointer(file)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} must hold a JSON object")
    return value


def _config_files(folder: Path, part: str) -> tuple[Path, ...]:
    if part != "tokenizer":
        others = (folder / name for name in _ALTERNATIVE_CONFIG_FILES.get(part, ()))
        return (folder / _CONFIG_FILES.get(part, "config.json"), *(file for file in others if file.is_file()))
    for names in TOKENIZER_FILES:
        if all((folder / name).is_file() for name in names):
            known = (*(name for names in TOKENIZER_FILES for name in names), *TOKENIZER_OPTIONS)
            present = tuple(folder / name for name in known if (folder / name).is_file())
            for file in present:
                check_not_a_pointer(file)
            return present
    wanted = " or ".join(" with ".join(names) for names in TOKENIZER_FILES)
    raise ModelError(f"tokenizer: {folder} has no {wanted}. Fetch or copy the model again")

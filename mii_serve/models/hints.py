"""What a folder or a repository without `model_index.json` is, and what to do with it. Reads names, JSON and headers."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from mii_serve.errors import ModelError
from mii_serve.models.single_file.contents import what_else
from mii_serve.models.weights import read_header

MODEL_INDEX = "model_index.json"
INTERRUPTED = "the download was interrupted. Fetch the model again; an interrupted `hf download` continues where it stopped"

_LORA_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_config.json")
EMBEDDING_FILES = ("learned_embeds.safetensors", "learned_embeds.bin")
_CHECKPOINTS = (".safetensors", ".ckpt")
_MAX_NAMED = 3


def hint_for(folder: Path) -> str:
    """One or two sentences for the end of a refusal."""
    below = [index.parent for pattern in (f"*/{MODEL_INDEX}", f"*/*/{MODEL_INDEX}") for index in sorted(folder.glob(pattern))]
    if below:
        return f"Did you mean {below[0]}?"
    if has_unfinished_download(folder):
        return f"It looks as if {INTERRUPTED}"
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if (hint := _hint_of_parts(names)) is not None:
        return hint
    if (class_name := _class_name(folder)) is not None:
        return f"It is a {class_name} alone, one part of a model. Give the folder that holds {MODEL_INDEX}"
    checkpoints = [name for name in names if name.endswith(_CHECKPOINTS)]
    for name in checkpoints:
        if (found := _what_else(folder / name)) is not None:
            return f"Its file {name} is {found}"
    if checkpoints:
        return f"If the model is a single file, give that file: {folder / checkpoints[0]}"
    return f"It holds {_listed(names)}. Give the folder that holds {MODEL_INDEX}"


def hint_for_repository(repo: str, names: Collection[str]) -> str:
    if (hint := _hint_of_parts(names)) is not None:
        return hint
    checkpoints = sorted(name for name in names if name.endswith(_CHECKPOINTS))
    if checkpoints:
        return f"If the model is a single file, fetch it with `hf download {repo} {checkpoints[0]}`, and give that file"
    return f"It holds {_listed(sorted(names))}"


def has_unfinished_download(folder: Path) -> bool:
    """`hf download --local-dir` keeps what it has not finished under `.cache`."""
    return any((folder / ".cache").rglob("*.incomplete"))


def _hint_of_parts(names: Collection[str]) -> str | None:
    if any(name in names for name in _LORA_FILES):
        return f"It is {what_else({'lora_A.weight': ()})}"
    if any(name in names for name in EMBEDDING_FILES):
        return f"It is {what_else({'emb_params': ()})}"
    return None


def _class_name(folder: Path) -> str | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        said = config.get("_class_name") or config["architectures"][0]
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        return None
    return str(said)[:80]


def _what_else(file: Path) -> str | None:
    if file.suffix != ".safetensors":
        return None
    try:
        header = read_header(file)
    except (ModelError, OSError):
        return None
    return what_else({name: entry["shape"] for name, entry in header.items() if name != "__metadata__"})


def _listed(names: Collection[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(list(names)[:_MAX_NAMED]) + (f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else "")

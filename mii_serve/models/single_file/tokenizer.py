"""Finds the vocabulary for a single file: no such file has one, and CLIP's is not part of this package.

The first of these that there is: the setting `tokenizer`; a folder `tokenizer/` beside the file, or its files beside it; the
hub's cache, of OpenAI's CLIP or of a Stable Diffusion model; the hub. All models of v1 and v2 have the same vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from mii_serve.errors import ModelError
from mii_serve.models.check import TOKENIZER_FILES, TOKENIZER_OPTIONS

CLIP = "openai/clip-vit-large-patch14"
_IN_CACHE = (
    (CLIP, ""),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer"),
    ("runwayml/stable-diffusion-v1-5", "tokenizer"),
    ("CompVis/stable-diffusion-v1-4", "tokenizer"),
)
_KNOWN = (*(name for names in TOKENIZER_FILES for name in names), *TOKENIZER_OPTIONS)

_logger = logging.getLogger(__name__)


def find_tokenizer(file: Path, given: Path | None) -> Path:
    """The folder of the vocabulary's files.

    Raises:
        ModelError: there is none; the message says where one may be put.
    """
    if given is not None:
        folder = given.expanduser().absolute()
        if has_tokenizer(folder / "tokenizer"):
            return folder / "tokenizer"
        if not has_tokenizer(folder):
            raise ModelError(f"tokenizer: {folder} is no folder with {wanted_files()}")
        return folder
    for folder in (file.parent / "tokenizer", file.parent):
        if has_tokenizer(folder):
            return folder
    for repo, inner in _IN_CACHE:
        if (cached := _snapshot(repo, inner, local_files_only=True)) is not None and has_tokenizer(cached):
            return cached
    fetched = _snapshot(CLIP, "", local_files_only=False)
    if fetched is not None and has_tokenizer(fetched):
        return fetched
    raise ModelError(
        f"{file} has no tokenizer, as no single file has: {wanted_files()} are needed. They were looked for in"
        f" {file.parent / 'tokenizer'}, in {file.parent}, in the hub's cache, and on the hub ({CLIP}). Every diffusers folder"
        " of a Stable Diffusion v1 or v2 model has them in tokenizer/, and ComfyUI in comfy/sd1_tokenizer; give one with"
        " --tokenizer FOLDER"
    )


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    return tuple(folder / name for name in _KNOWN if (folder / name).is_file())


def has_tokenizer(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES)


def wanted_files() -> str:
    return " or ".join(" with ".join(names) for names in TOKENIZER_FILES)


def _snapshot(repo: str, inner: str, *, local_files_only: bool) -> Path | None:
    from huggingface_hub import snapshot_download

    patterns: Iterable[str] = (f"{inner}/{name}" if inner else name for name in _KNOWN)
    try:
        found = snapshot_download(repo, allow_patterns=list(patterns), local_files_only=local_files_only)
    except (OSError, ValueError, RuntimeError) as error:  # offline, no such cache, no connection, an answer that is none
        if not local_files_only:
            _logger.info("%s could not be fetched: %s", repo, type(error).__name__)
        return None
    return Path(found) / inner

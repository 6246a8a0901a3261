"""Fetch from the Hugging Face hub what a pipeline needs of a repository, and nothing else.

First the small files (JSON and the tokenizer's text), then for each part the weights of one kind: many repositories hold
the same weights in four formats. What the cache already has is not fetched again, and where the hub cannot be reached the
cache alone is used.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mii_serve.errors import ModelError
from mii_serve.models.check import read_model_index
from mii_serve.models.hints import MODEL_INDEX, hint_for_repository
from mii_serve.models.weights import MODEL_PARTS, candidates, find_weights

if TYPE_CHECKING:
    from mii_serve.models import Precision

_SMALL_FILES = (
    MODEL_INDEX,
    "mii_serve_defaults.json",
    *(f"{part}/*.json" for part in (*MODEL_PARTS, "tokenizer", "scheduler", "feature_extractor")),
    "tokenizer/*.txt",
)

_logger = logging.getLogger(__name__)


def fetch(
    repo: str, revision: str | None, *, dtype: Precision, allow_pickle: bool, enable_safety_checker: bool
) -> tuple[Path, str]:
    """The snapshot's folder in the cache, and its commit.

    Raises:
        ModelError: no such model or revision, no access, or no way to reach the hub and not in the cache.
    """
    folder = _small_files(repo, revision)
    if not (folder / MODEL_INDEX).is_file():
        raise _without_an_index(repo, folder.name)
    parts = [part for part in read_model_index(folder) if part in MODEL_PARTS]
    if not enable_safety_checker:
        parts = [part for part in parts if part != "safety_checker"]
    kinds_of = {part: candidates(part, dtype, allow_pickle=allow_pickle) for part in parts}
    for choice in range(max(map(len, kinds_of.values()))):
        parts = [part for part in parts if not _has_weights(folder / part, part, dtype, allow_pickle=allow_pickle)]
        if not parts:
            break
        kinds = {part: kinds_of[part][choice] for part in parts if choice < len(kinds_of[part])}
        if not kinds:
            break
        _logger.info("%s: fetching the weights of %s", repo, ", ".join(kinds))
        patterns = [f"{part}/{name}" for part, kind in kinds.items() for name in (kind.file, kind.index, kind.shards)]
        try:
            _snapshot(repo, folder.name, patterns)
        except Exception as error:
            raise _explained(repo, revision, error) from error
    for part in parts:
        if not any((folder / part / name).exists() for kind in kinds_of[part] for name in (kind.file, kind.index)):
            raise _without_weights(repo, revision, part, folder, allow_pickle=allow_pickle)
    return folder, folder.name


def _small_files(repo: str, revision: str | None) -> Path:
    try:
        return _snapshot(repo, revision, _SMALL_FILES)
    except Exception as error:
        cached = _cached(repo, revision)
        if cached is None or _is_refusal(error):
            raise _explained(repo, revision, error) from error
        _logger.warning("%s: the hub cannot be reached (%s); using the cached %s", repo, type(error).__name__, cached.name)
        return cached


def _snapshot(repo: str, revision: str | None, patterns: tuple[str, ...] | list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))


def _cached(repo: str, revision: str | None) -> Path | None:
    """The snapshot in the cache, even where files that we do not need are missing from it."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[MODEL_INDEX], local_files_only=True))
    except (OSError, ValueError):
        return None


def _has_weights(folder: Path, part: str, dtype: Precision, *, allow_pickle: bool) -> bool:
    try:
        find_weights(folder, part, dtype, allow_pickle=allow_pickle)
    except (ModelError, OSError):
        return False
    return True


def _is_refusal(error: Exception) -> bool:
    """The hub was reached, and has no such model or revision."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    return isinstance(error, RepositoryNotFoundError | RevisionNotFoundError)


def _explained(repo: str, revision: str | None, error: Exception) -> ModelError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    hub = constants.ENDPOINT
    match error:
        case GatedRepoError():
            return ModelError(f"{repo} is gated: accept its conditions on {hub}/{repo} and set HF_TOKEN to your token")
        case RepositoryNotFoundError():
            return ModelError(
                f"{hub} has no model {repo}, or it is private. Check the name; for a private model set HF_TOKEN. A local"
                " folder must exist to be found"
            )
        case RevisionNotFoundError():
            return ModelError(f"{hub} has {repo}, but no revision {revision}. Give a branch, a tag or a commit of it")
        case _ if constants.HF_HUB_OFFLINE:
            return _out_of_reach(repo, revision, "HF_HUB_OFFLINE forbids asking the hub")
    reason = (str(error).splitlines() or [""])[0][:200]
    return _out_of_reach(repo, revision, f"{hub} could not be asked ({type(error).__name__}: {reason})")


def _without_an_index(repo: str, commit: str) -> ModelError:
    from huggingface_hub import HfApi

    try:
        names = [file.rfilename for file in HfApi().model_info(repo, revision=commit).siblings or ()]
        hint = hint_for_repository(repo, names)
    except (OSError, ValueError):
        hint = "Give a repository that has one"
    return ModelError(f"{repo} has no {MODEL_INDEX}, so it is not a diffusers model. {hint}")


def _out_of_reach(repo: str, revision: str | None, why: str) -> ModelError:
    from huggingface_hub import constants

    at_revision = f" --revision {revision}" if revision else ""
    return ModelError(
        f"{repo} (revision {revision or 'main'}) is not, or not completely, in the cache {constants.HF_HUB_CACHE}, and"
        f" {why}. On a machine that can reach it, run `hf download {repo}{at_revision}` and copy its cache here (HF_HOME),"
        " or give the path of a local model folder"
    )


def _without_weights(repo: str, revision: str | None, part: str, folder: Path, *, allow_pickle: bool) -> ModelError:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _out_of_reach(repo, revision, f"HF_HUB_OFFLINE forbids fetching the weights of {part}")
    if allow_pickle:
        return ModelError(f"{repo} has no weights of {part}, or they could not be fetched into {folder}")
    return ModelError(
        f"{repo} has no weights of {part} as safetensors, or they could not be fetched into {folder}. Where it has only"
        " pickles (.bin), which can run code when they are read: convert it, choose another revision, or, if you trust"
        " their source, set allow_pickle (MII_SERVE_ALLOW_PICKLE=true)"
    )

"""Source, inspection, loading and defaults, one after the other. Imports torch: only `load_model` comes here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mii_serve.errors import ConfigError, ModelError
from mii_serve.models import RANDOM_SD_V1_4, AddedParts, LoadedModel
from mii_serve.models.check import check_folder
from mii_serve.models.defaults import DeclaredDefaults, defaults_files, read_defaults, settle
from mii_serve.models.fingerprint import fingerprint_of_named, revision_of
from mii_serve.models.given_embedding import GivenEmbedding, find_embedding
from mii_serve.models.given_vae import GivenVae, find_vae
from mii_serve.models.loading import TORCH_DTYPES, check_device, load_pipeline
from mii_serve.models.random_init import load_random
from mii_serve.models.single_file.check import check_file
from mii_serve.models.single_file.loading import load_file
from mii_serve.models.source import find_model
from mii_serve.models.tensor_parallel import TensorShard, keep_shard

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from mii_serve.config import LimitsConfig
    from mii_serve.models import Precision

_logger = logging.getLogger(__name__)


def load(
    model: str,
    *,
    revision: str | None,
    dtype: Precision,
    device: str,
    allow_pickle: bool,
    enable_safety_checker: bool,
    limits: LimitsConfig,
    added: AddedParts,
    shard: TensorShard | None = None,
) -> LoadedModel:
    on_device = check_device(device)
    given = _Given.find(added, dtype=dtype, allow_pickle=allow_pickle)
    if model == RANDOM_SD_V1_4:
        if replace(added, loras={}) != AddedParts():
            raise ConfigError("model", f"{RANDOM_SD_V1_4} takes no tokenizer, VAE or embeddings; leave them out")
        pipeline, digest = load_random(
            revision=revision, dtype=dtype, device=on_device, enable_safety_checker=enable_safety_checker
        )
        if shard is not None:
            keep_shard(pipeline.unet, shard)
        return _loaded(pipeline, model, digest, DeclaredDefaults(), limits)
    found = find_model(
        model,
        revision=revision,
        dtype=dtype,
        allow_pickle=allow_pickle,
        enable_safety_checker=enable_safety_checker,
    )
    try:
        if found.file is not None:
            file = check_file(found.file, allow_pickle=allow_pickle, tokenizer=added.tokenizer)
            _warn_about_the_checker(found.name, False, enable_safety_checker)
            with ThreadPoolExecutor(1, thread_name_prefix="revision") as beside:
                named = beside.submit(fingerprint_of_named, file.files)
                pipeline = load_file(file, dtype=TORCH_DTYPES[dtype], device=on_device, shard=shard)
                revision_name = given.add_to(pipeline, named.result(), dtype=dtype, device=on_device)
                return _loaded(pipeline, found.name, revision_name, DeclaredDefaults(), limits)
        if added.tokenizer is not None:
            raise ConfigError("tokenizer", f"is for models in a single file, and {found.name} has its own; leave it out")
        checked = check_folder(
            found.folder, dtype=dtype, allow_pickle=allow_pickle, enable_safety_checker=enable_safety_checker
        )
        declared = read_defaults(found.folder)
        _warn_about_the_checker(found.name, "safety_checker" in checked.parts, enable_safety_checker)
        with ThreadPoolExecutor(1, thread_name_prefix="revision") as beside:
            # Both read the same files, so that the second to come finds them in memory.
            named = beside.submit(revision_of, found.folder, (*checked.files, *defaults_files(found.folder)), found.commit)
            pipeline = load_pipeline(checked, dtype=dtype, device=on_device, shard=shard)
            own_revision = named.result()
        revision_name = given.add_to(pipeline, own_revision, dtype=dtype, device=on_device)
    except OSError as error:
        raise ModelError(f"{found.folder} cannot be read: {error}. Check its permissions and its disk") from error
    if found.commit not in (None, own_revision):
        _logger.warning("%s: the files are not, or not provably, those of commit %s", found.name, found.commit)
    return _loaded(pipeline, found.name, revision_name, declared, limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """What is added to the model's own parts, found and checked."""

    vae: GivenVae | None
    embeddings: Sequence[GivenEmbedding]

    @classmethod
    def find(cls, added: AddedParts, *, dtype: Precision, allow_pickle: bool) -> _Given:
        vae = None if added.vae is None else find_vae(added.vae, dtype=dtype, allow_pickle=allow_pickle)
        embeddings = [find_embedding(*each, allow_pickle=allow_pickle) for each in added.embeddings.items()]
        return cls(vae=vae, embeddings=embeddings)

    def add_to(self, pipeline: StableDiffusionPipeline, revision: str, *, dtype: Precision, device: torch.device) -> str:
        """The revision of the model with what was added."""
        files: dict[str, Path] = {}
        if self.vae is not None:
            pipeline.register_modules(vae=self.vae.load(dtype=dtype, device=device))
            files |= self.vae.files
        for embedding in self.embeddings:
            embedding.add_to(pipeline)
            files[f"embedding/{embedding.token}"] = embedding.file.path
        return f"{revision}+{fingerprint_of_named(files)}" if files else revision


def _loaded(
    pipeline: StableDiffusionPipeline, name: str, revision: str, declared: DeclaredDefaults, bounds: LimitsConfig
) -> LoadedModel:
    defaults, limits = settle(
        declared,
        bounds,
        sample_size=pipeline.unet.config.sample_size,
    )
    return LoadedModel(pipeline=pipeline, name=name, revision=revision, defaults=defaults, limits=limits)


def _warn_about_the_checker(name: str, has_checker: bool, enable_safety_checker: bool) -> None:
    if not enable_safety_checker:
        _logger.warning("%s: the safety checker is turned off; images are not checked", name)
    elif not has_checker:
        _logger.warning("%s has no safety checker; images are not checked", name)

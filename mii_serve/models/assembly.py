"""Source, inspection, loading and defaults, one after the other. Imports torch: only `load_model` comes here."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from mii_serve.errors import ConfigError, ModelError
from mii_serve.models import RANDOM_SD_V1_4, AddedParts, LoadedModel
from mii_serve.models.check import check_folder
from mii_serve.models.defaults import DeclaredDefaults, defaults_files, read_defaults, settle
from mii_serve.models.fingerprint import fingerprint_of_named, revision_of
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
    if model == RANDOM_SD_V1_4:
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
                return _loaded(pipeline, found.name, named.result(), DeclaredDefaults(), limits)
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
            revision_name = named.result()
    except OSError as error:
        raise ModelError(f"{found.folder} cannot be read: {error}. Check its permissions and its disk") from error
    if found.commit not in (None, revision_name):
        _logger.warning("%s: the files are not, or not provably, those of commit %s", found.name, found.commit)
    return _loaded(pipeline, found.name, revision_name, declared, limits)


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

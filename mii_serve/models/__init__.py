"""Find a Stable Diffusion v1.x model, inspect it, and load it.

What `model` may be, in the order it is tried:

1. `demo`: the small model that is part of this package. `random-sd-v1-4`: the size and shape of Stable Diffusion v1-4 with
   random weights, for benchmarks. A folder of such a name is meant by `./demo`.
2. A path that exists: a diffusers folder (with `model_index.json`), or an Azure ML model folder (what `AZUREML_MODEL_DIR`
   points at: `mlflow_model_folder/artifacts/INPUT_model_path/` below it). An existing path wins over a hub id.
   A file of weights (`.safetensors`; `.ckpt` where pickles are allowed): a Stable Diffusion checkpoint in the original layout
   (`single_file/`).
3. `org/name` or `org/name@revision`: a model on the Hugging Face hub or in its local cache. `HF_HOME`, `HF_HUB_CACHE`,
   `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` have their usual meaning.

A folder is inspected before anything of it is loaded, so a model that cannot be served fails within a second with the
reason. No code of a model is ever run: only the known classes of a `StableDiffusionPipeline` are built, pickled weights are
refused unless `allow_pickle`, and even then read without running code.

A model declares what requests that leave parameters out get, and which sizes it can make, in `mii_serve_defaults.json`
beside `model_index.json` (see `defaults.py`). Which schedulers exist is not decided here: `defaults.scheduler` is the
one that file names, or `default`, the model's own.

Importing this package costs nothing; torch, diffusers and transformers are imported when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mii_serve.types import GenerationDefaults, Limits

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from mii_serve.config import LimitsConfig
    from mii_serve.models.loras import LoraAdapter
    from mii_serve.models.tensor_parallel import TensorShard

__all__ = ["DEMO", "RANDOM_SD_V1_4", "AddedParts", "LoadedModel", "Precision", "load_model"]

Precision = Literal["fp32", "fp16", "bf16"]

DEMO = "demo"
RANDOM_SD_V1_4 = "random-sd-v1-4"


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedParts:
    """What the operator gives beside the model.

    The folder of the tokenizer for a model in a single file; a VAE in the place of the model's own; embeddings by their tokens;
    LoRAs by their names, which change nothing but the images of requests that name them.
    """

    tokenizer: Path | None = None
    vae: Path | None = None
    embeddings: Mapping[str, Path] = field(default_factory=dict)
    loras: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A pipeline on its device, in evaluation mode, every part in the requested precision.

    `revision` is the hub commit where the files prove it, otherwise `sha256:` and a fingerprint of them (`fingerprint.py`).
    """

    pipeline: StableDiffusionPipeline = field(repr=False)
    name: str
    revision: str
    defaults: GenerationDefaults
    limits: Limits
    loras: Mapping[str, LoraAdapter] = field(default_factory=dict, repr=False)


def load_model(
    model: str,
    *,
    revision: str | None,
    dtype: Precision,
    device: str,
    allow_pickle: bool = False,
    enable_safety_checker: bool = True,
    limits: LimitsConfig,
    added: AddedParts = AddedParts(),
    shard: TensorShard | None = None,
) -> LoadedModel:
    """Find, inspect and load `model`; with `shard`, only a rank's part of its UNet.

    Raises:
        ModelError: it cannot be found, read or used; the message says what is wrong, where, and what to do.
        ConfigError: the device is not there, the operator's limits leave no size the model can make, or so many
            ranks cannot share its UNet.
    """
    from mii_serve.models.quiet import quiet_libraries

    with quiet_libraries():
        from mii_serve.models import assembly
        from mii_serve.models.loras import load_loras

        loaded = assembly.load(
            model,
            revision=revision,
            dtype=dtype,
            device=device,
            allow_pickle=allow_pickle,
            enable_safety_checker=enable_safety_checker,
            limits=limits,
            added=added,
            shard=shard,
        )
        return replace(loaded, loras=load_loras(added.loras, loaded.pipeline)) if added.loras else loaded

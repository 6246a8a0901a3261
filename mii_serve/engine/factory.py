"""Loads the configured model and builds the configured engine for it.

`auto` is `deepspeed` where DeepSpeed is installed, its kernels pass their check and a UNet call with them has been measured to
be the faster one, `native` otherwise, and `reference` for a UNet that neither supports. What could not be used, and why, is the
engine's note; what was measured is in the note of the kernels.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import diffusers
import torch
import transformers

from mii_serve.config import DeployConfig
from mii_serve.engine import Engine
from mii_serve.engine.batched import BatchedEngine
from mii_serve.engine.batched.buckets import BatchShape
from mii_serve.engine.batched.engine import MAX_SLOTS
from mii_serve.engine.engine_times import COMPUTED_TO_BE_FASTER
from mii_serve.engine.kernels import KernelSet
from mii_serve.engine.kernels.comparison import compare_engines
from mii_serve.engine.kernels.deepspeed import install_kernels
from mii_serve.engine.kernels.fused.install import Installed, native_kernels
from mii_serve.engine.kernels.native import why_unsupported
from mii_serve.engine.kernels.rows import RowParallelKernels
from mii_serve.engine.kernels.sharded import ShardedKernels
from mii_serve.engine.machine import inspect_machine
from mii_serve.engine.ranks.group import RankGroup
from mii_serve.engine.ranks.leader import lead
from mii_serve.engine.reference import ReferenceEngine
from mii_serve.engine.requirements import first_missing
from mii_serve.errors import ConfigError, ModelError, UnusableEngineError
from mii_serve.models import AddedParts, LoadedModel, Precision, load_model
from mii_serve.models.tensor_parallel import TensorShard

logger = logging.getLogger(__name__)


def build_engine(config: DeployConfig) -> Engine:
    """Find and load the model, and build its engine, which is not warm yet.

    Raises:
        ConfigError: a setting asks for what this machine or this release does not have.
        ModelError: the model cannot be found or used.
    """
    if config.tensor_parallel > 1:
        return lead(config, functools.partial(build_rank, config))
    return _build(config, None)


def build_rank(config: DeployConfig, group: RankGroup) -> BatchedEngine:
    """The engine of one rank. It makes no call before the group is connected.

    Raises:
        ConfigError, ModelError: as `build_engine`.
    """
    engine = _build(config, group)
    if not isinstance(engine, BatchedEngine):
        only = engine.description.engine
        raise ConfigError("tensor_parallel", f"only the {only} engine can run this model, and it runs on one device; use 1")
    return engine


def _build(config: DeployConfig, group: RankGroup | None) -> Engine:
    if config.engine == "reference" and config.max_slots not in (None, 1):
        raise ConfigError("max_slots", f"the reference engine makes one picture at a time, got {config.max_slots}")
    _keep_prompts_out_of_logs()
    device = _device(config.device)
    if config.engine == "reference":
        return ReferenceEngine(_load(config, device, _reference_dtype(config)))
    if group is not None and config.parallelism == "tensor":
        model = _load(config, device, _dtype(config, device), TensorShard(rank=group.rank, world_size=group.size))
        return sharded_engine(model, group, max_slots=config.max_slots)
    if config.engine == "deepspeed":
        if config.lora:
            raise ConfigError("lora", "DeepSpeed's kernels compute no LoRAs; use the engine 'native'")
        return deepspeed_engine(_deepspeed_model(config, device), max_slots=config.max_slots, group=group)
    taken = _Native()
    if config.engine == "auto":
        try:
            found = _faster(config, device, group)
        except UnusableEngineError as error:
            found = _Native(note=f"not deepspeed: {error.rule}")
            logger.info("%s", found.note)
        if not isinstance(found, _Native):
            return found
        taken = found
    note, why = taken.note, taken.why
    model = taken.model or _load(config, device, _dtype(config, device))
    del taken
    reason = why_unsupported(model.pipeline.unet)
    if reason is None:
        return native_engine(model, max_slots=config.max_slots, note=note, group=group, why=why)
    if config.engine == "native":
        raise ModelError(f"the native engine cannot run this UNet: {reason}. Use the engine 'reference'")
    logger.warning("the reference engine serves this model, one picture at a time: its UNet has %s", reason)
    del model
    note = f"neither deepspeed nor native, one picture at a time: the UNet has {reason}"
    return ReferenceEngine(_load(config, device, "fp32"), note=note)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Native:
    """`auto` has taken `native`, with this note or for this reason. `model` is loaded already where it is not None."""

    model: LoadedModel | None = None
    note: str = ""
    why: str = ""


def _faster(config: DeployConfig, device: str, group: RankGroup | None) -> BatchedEngine | _Native:
    """Of the engines `native` and `deepspeed`, where both can run.

    Raises:
        UnusableEngineError: deepspeed cannot.
    """
    if config.lora:
        raise UnusableEngineError("its kernels compute no LoRAs")
    _require_deepspeed(config, device)
    if group is not None:  # each rank would measure something else
        why = f"{COMPUTED_TO_BE_FASTER} by computed bounds, as ranks do not measure which engine is the faster"
        if COMPUTED_TO_BE_FASTER == "native":
            return _Native(why=why)
        return deepspeed_engine(_deepspeed_model(config, device), max_slots=config.max_slots, group=group, why=why)
    model = _deepspeed_model(config, device)
    comparison = compare_engines(model, max_slots=config.max_slots or MAX_SLOTS)
    times, installed = comparison.times, comparison.deepspeed
    why = f"{times.faster} by measurement: {times.summary()}"
    logger.info("%s", why)
    if times.faster == "deepspeed":
        return deepspeed_engine(model, max_slots=config.max_slots, installed=installed, why=why)
    if installed is None:
        return _Native(model=model, why=why)
    installed.kernels.close()
    return _Native(why=why)  # the UNet has been changed in place


def _deepspeed_model(config: DeployConfig, device: str) -> LoadedModel:
    """The model, loaded for DeepSpeed's kernels.

    Raises:
        UnusableEngineError: they cannot run here, or cannot run this UNet.
    """
    _require_deepspeed(config, device)
    model = _load(config, device, "fp16")
    if (reason := why_unsupported(model.pipeline.unet)) is not None:
        raise UnusableEngineError(f"deepspeed cannot run this UNet: it has {reason}")
    return model


def _require_deepspeed(config: DeployConfig, device: str) -> None:
    if config.dtype not in ("auto", "fp16"):
        raise UnusableEngineError(f"deepspeed computes in fp16 only, and the setting dtype is {config.dtype!r}")
    if not device.startswith("cuda") and config.device != "auto":
        raise UnusableEngineError(f"deepspeed computes on CUDA only, and the setting device is {config.device!r}")
    if (missing := first_missing("deepspeed", inspect_machine())) is not None:
        raise UnusableEngineError(f"deepspeed needs {missing.what}, found {missing.found}; fix it with: {missing.remedy}")


def native_engine(
    model: LoadedModel,
    *,
    max_slots: int | None = None,
    buckets: Sequence[BatchShape] | None = None,
    note: str = "",
    group: RankGroup | None = None,
    why: str = "",
) -> BatchedEngine:
    """The batched engine with our own kernels. `why_unsupported` returns None for the model's UNet; see `BatchedEngine`.

    `why` this engine runs is in the note of its kernels.
    """
    installed = native_kernels(model, max_slots=max_slots or MAX_SLOTS)
    return _batched(model, installed, max_slots=max_slots, buckets=buckets, note=note, group=group, why=why)


def sharded_engine(model: LoadedModel, group: RankGroup, *, max_slots: int | None = None) -> BatchedEngine:
    """The batched engine of one rank, with our own kernels for its part of the UNet, which is all that `model` has.

    Raises:
        ModelError: they cannot run this UNet.
    """
    if (reason := why_unsupported(model.pipeline.unet)) is not None:
        raise ModelError(f"the native engine cannot run this UNet: {reason}. Use the engine 'reference', on one device")
    kernels = ShardedKernels(model.pipeline.unet, group)
    return BatchedEngine(model, kernels, max_slots=max_slots, group=group)


def deepspeed_engine(
    model: LoadedModel,
    *,
    max_slots: int | None = None,
    buckets: Sequence[BatchShape] | None = None,
    group: RankGroup | None = None,
    installed: Installed | None = None,
    why: str = "",
) -> BatchedEngine:
    """The batched engine with DeepSpeed's kernels. The UNet of `model`, in float16, is changed in place, unless they are
    `installed` in it already. `why` this engine runs is in their note.

    Raises:
        UnusableEngineError: DeepSpeed cannot do it, or its kernels do not compute what the UNet computes.
    """
    installed = installed or install_kernels(model, max_slots=max_slots or MAX_SLOTS)
    return _batched(model, installed, max_slots=max_slots, buckets=buckets, group=group, why=why)


def _batched(
    model: LoadedModel,
    installed: Installed,
    *,
    max_slots: int | None,
    buckets: Sequence[BatchShape] | None = None,
    note: str = "",
    group: RankGroup | None,
    why: str = "",
) -> BatchedEngine:
    kernels = _on_ranks(installed.kernels, group)
    engine = BatchedEngine(model, kernels, max_slots=max_slots, buckets=buckets, note=note, group=group)
    engine.description = replace(engine.description, kernels="; ".join(filter(None, (installed.about, why))))
    return engine


def _on_ranks(kernels: KernelSet, group: RankGroup | None) -> KernelSet:
    return kernels if group is None else RowParallelKernels(kernels, group)


def precision_of(config: DeployConfig) -> Precision:
    """The precision the configured engine will compute in, known before anything is loaded.

    Raises:
        ConfigError: this engine or this device cannot.
    """
    device = _device(config.device)
    return _reference_dtype(config) if config.engine == "reference" else _dtype(config, device)


def _load(config: DeployConfig, device: str, dtype: Precision, shard: TensorShard | None = None) -> LoadedModel:
    if dtype == "fp32":  # left alone, PyTorch lets cuDNN take ten bits of a number's twenty-three
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = load_model(
        config.model,
        revision=config.revision,
        dtype=dtype,
        device=device,
        allow_pickle=config.allow_pickle,
        enable_safety_checker=config.enable_safety_checker,
        limits=config.limits,
        added=added_parts(config),
        shard=shard,
    )
    return replace(model, name=config.served_model_name[0]) if config.served_model_name else model


def added_parts(config: DeployConfig) -> AddedParts:
    return AddedParts(tokenizer=config.tokenizer, vae=config.vae, embeddings=config.embedding, loras=config.lora)


def _reference_dtype(config: DeployConfig) -> Precision:
    if config.dtype not in ("auto", "fp32"):
        raise ConfigError("dtype", f"the reference engine computes in fp32 only, got {config.dtype!r}")
    return "fp32"


def _dtype(config: DeployConfig, device: str) -> Precision:
    is_cuda = device.startswith("cuda")
    if config.dtype == "auto":
        return "fp16" if is_cuda else "fp32"
    if config.dtype == "fp16" and not is_cuda:
        raise ConfigError("dtype", "fp16 needs a GPU; on a CPU use 'fp32' or 'bf16'")
    return config.dtype


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("device", "no CUDA device is available; use 'cpu' or 'auto'")
    return name


def _keep_prompts_out_of_logs() -> None:
    """diffusers and transformers log the text of a prompt that is too long; the caller gets it in the result instead."""
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()

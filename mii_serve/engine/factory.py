"""Loads the configured model and puts the configured engine on it."""

from __future__ import annotations

import diffusers
import torch
import transformers

from mii_serve.config import DeployConfig
from mii_serve.engine import Engine
from mii_serve.errors import ConfigError
from mii_serve.models import Precision, load_model


def build_engine(config: DeployConfig) -> Engine:
    """Find, load and wrap the model.

    Raises:
        ConfigError: a setting asks for what this machine or this release does not have.
        ModelError: the model cannot be found or used.
    """
    if config.engine == "deepspeed":
        raise ConfigError("engine", "'deepspeed' is not part of this release; use 'auto', 'native' or 'reference'")
    device = _device(config.device)
    dtype = _dtype(config, device)
    _keep_prompts_out_of_logs()
    model = load_model(
        config.model,
        revision=config.revision,
        dtype=dtype,
        device=device,
        allow_pickle=config.allow_pickle,
        enable_safety_checker=config.enable_safety_checker,
        limits=config.limits,
    )
    if config.engine == "reference":
        from mii_serve.engine.reference import ReferenceEngine

        return ReferenceEngine(model)
    from mii_serve.engine.native import NativeEngine

    return NativeEngine(model, max_slots=config.max_slots)


def _dtype(config: DeployConfig, device: str) -> Precision:
    if config.engine == "reference" and config.dtype not in ("auto", "fp32"):
        raise ConfigError("dtype", f"the reference engine computes in fp32 only, got {config.dtype!r}")
    if config.dtype != "auto":
        return config.dtype
    return "fp16" if device.startswith("cuda") and config.engine != "reference" else "fp32"


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("device", "no CUDA device is available; use 'cpu' or 'auto'")
    return name


def _keep_prompts_out_of_logs() -> None:
    """diffusers and transformers warn about a long prompt by quoting it; the answer to the caller says it better."""
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()

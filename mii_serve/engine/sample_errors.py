"""What one sample fails with, and which errors are about one sample at all."""

from __future__ import annotations

import logging
from typing import Any

import torch

from mii_serve.engine.decode import Fault, decodes_in_fp32
from mii_serve.errors import EngineError, MiiServeError, NotFiniteError
from mii_serve.types import Sample

logger = logging.getLogger(__name__)


def sample_error(error: Exception, sample: Sample, step: int) -> MiiServeError:
    """What this sample ends with when `error`, which is about it alone, was raised for it after `step` UNet calls."""
    if isinstance(error, NotFiniteError):
        return error
    logger.error("a sample failed, request_id=%s", sample.id.request_id, exc_info=error)
    return EngineError(f"this image failed after step {step}: {type(error).__name__}: {error}")


def is_of_one_sample(error: Exception) -> bool:
    """Whether an error is about one sample's values, and the engine's state is sound.

    Python code raises the first kinds; torch raises a RuntimeError for tensors that do not fit each other, before anything has
    run, and for a device that failed or is full, after which nothing is known.
    """
    if isinstance(error, NotFiniteError | ArithmeticError | AttributeError | LookupError | NameError | TypeError | ValueError):
        return True
    is_of_device = isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error)
    return isinstance(error, RuntimeError) and not is_of_device


def not_finite(fault: Fault, *, step: int, pipeline: Any) -> NotFiniteError:
    """What a sample with this fault of `decode` ends with: what happened, and what to do."""
    unet, vae = pipeline.unet, pipeline.vae
    if fault == "latents":
        what, remedy = f"its latents are not finite after step {step}", _remedy(unet.dtype)
    elif decodes_in_fp32(vae):
        what, remedy = "what its VAE decodes is not finite, in fp16 nor in fp32", "look at the VAE's weights"
    elif vae.dtype == torch.float16:
        what = "what its VAE decodes in fp16 is not finite, and its config says force_upcast: false, so fp32 was not tried"
        remedy = "deploy the model with --dtype bf16 or fp32, or set force_upcast to true in vae/config.json for an fp32 VAE"
    else:
        what, remedy = "what its VAE decodes is not finite", _remedy(vae.dtype)
    return NotFiniteError(f"this picture failed: {what}; {remedy}")


def _remedy(dtype: torch.dtype) -> str:
    if dtype == torch.float16:
        return "fp16 overflows easily: deploy the model with --dtype bf16 or fp32, or ask for other parameters"
    first = "--dtype fp32 may help; " if dtype == torch.bfloat16 else ""
    return f"{first}look at the model's weights, and at the scheduler with this number of steps and this guidance_scale"

"""Which errors cost one sample, and which the engine."""

from __future__ import annotations

import torch


def is_of_one_sample(error: Exception) -> bool:
    """Whether an error is about one sample's values, and the engine's state is sound.

    Python code raises the first kinds; torch raises a RuntimeError for tensors that do not fit each other, before anything has
    run, and for a device that failed or is full, after which nothing is known.
    """
    if isinstance(error, ArithmeticError | AttributeError | LookupError | NameError | TypeError | ValueError):
        return True
    is_of_device = isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error)
    return isinstance(error, RuntimeError) and not is_of_device

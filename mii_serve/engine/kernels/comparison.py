"""Times a UNet call with the native kernels and with DeepSpeed's, on one model, one after the other.

**This has not run on a GPU yet.**
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mii_serve.engine.engine_times import EngineTimes, EngineTimesFile
from mii_serve.engine.kernels import KernelSet
from mii_serve.engine.kernels.deepspeed import install_kernels
from mii_serve.engine.kernels.fused.choice import source_digest
from mii_serve.engine.kernels.fused.install import Device, Installed, PassInputs, about_model, native_kernels, this_device
from mii_serve.engine.kernels.timing import time_ms
from mii_serve.errors import UnusableEngineError
from mii_serve.models import LoadedModel

logger = logging.getLogger(__name__)

NUM_CALLS = 3


@dataclass(frozen=True, slots=True)
class Comparison:
    """`deepspeed` are its kernels where they are in the model now; None where the times were known, and it is as it was."""

    times: EngineTimes
    deepspeed: Installed | None


def compare_engines(model: LoadedModel, *, max_slots: int) -> Comparison:
    """Measure on the model's device, or read what was measured there before with the same versions, kernels and shapes.

    Raises:
        UnusableEngineError: DeepSpeed's kernels cannot compute this UNet, or are wrong, or cannot be timed.
    """
    try:
        device = this_device(model.pipeline.unet.device)
    except Exception as failure:
        raise UnusableEngineError(f"it cannot be timed: {type(failure).__name__}: {failure}") from failure
    return compare(model, device, max_slots=max_slots, time_ms=lambda call: time_ms(call, NUM_CALLS))


def compare(
    model: LoadedModel,
    device: Device,
    *,
    max_slots: int,
    time_ms: Callable[[Callable[[], object]], float],
    folder: Path | None = None,
) -> Comparison:
    """As `compare_engines`, on any device."""
    inputs, counts = PassInputs.of(model), tuple(dict.fromkeys((1, max_slots)))
    about = {
        **device.about,
        "deepspeed": importlib.metadata.version("deepspeed"),
        "deepspeed_kernels": source_digest(Path(__file__).parent / "deepspeed"),
        "model": about_model(model.pipeline, inputs.latent_shape, counts),
    }
    file = EngineTimesFile(about, folder)
    if (known := file.read()) is not None:
        return Comparison(known, None)
    native = native_kernels(model, max_slots=max_slots)
    try:
        native_ms = _call_ms(native.kernels, inputs, counts, time_ms)
        deepspeed = install_kernels(model, max_slots=max_slots, around=native)
        deepspeed_ms = _call_ms(deepspeed.kernels, inputs, counts[: len(native_ms)], time_ms)
    except UnusableEngineError:
        raise
    except Exception as failure:
        raise UnusableEngineError(f"it cannot be timed: {type(failure).__name__}: {failure}") from failure
    both = min(len(native_ms), len(deepspeed_ms))
    times = EngineTimes(device=device.name, native_ms=native_ms[:both], deepspeed_ms=deepspeed_ms[:both])
    file.write(times)
    logger.info("%s: %s", times.faster, times.summary())
    return Comparison(times, deepspeed)


def _call_ms(
    kernels: KernelSet, inputs: PassInputs, counts: tuple[int, ...], time_ms: Callable[[Callable[[], object]], float]
) -> tuple[float, ...]:
    """Of so many guided samples each, as far as there is memory for them."""
    found: list[float] = []
    with torch.inference_mode(False), torch.no_grad():
        for count in counts:
            try:
                found.append(time_ms(inputs.call(kernels, count)))
            except torch.OutOfMemoryError:
                if not found:
                    raise
                break
    return tuple(found)

#!/usr/bin/env python3
"""Time every fused kernel, and every attention there is, on every shape of v1-4 at 512 × 512, on a GPU: `make gpu-tune`.

    python benchmarks/kernel_times.py           nine minutes at most
    python benchmarks/kernel_times.py           again: what is in the file is not measured again

It runs the native engine's own choice (`engine/kernels/fused/install.py`) with more ways: each of PyTorch's attentions by
itself. A way that is wrong is refused with the reason before it is timed. Whole UNet calls and a decode are timed with the
fastest ways so far, once with the convolutions that cuDNN takes by itself, and once with the fastest of those it tries
(`cudnn.benchmark`). The file is written after each shape and each call.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mii_serve.bench import environment
from mii_serve.config import DeployConfig
from mii_serve.engine.kernel_choices import Choice, Measurement, choice_from
from mii_serve.engine.kernels.fused.choice import ChosenOperations
from mii_serve.engine.kernels.fused.forward import FusedKernels
from mii_serve.engine.kernels.fused.install import Device, PassInputs, this_device
from mii_serve.engine.kernels.fused.measuring import MeasuringOperations
from mii_serve.engine.kernels.fused.operations import Operations, TorchOperations
from mii_serve.engine.kernels.fused.vae import FusedDecoder
from mii_serve.models import RANDOM_SD_V1_4, load_model

RESULTS = Path(__file__).parent / "results"
NUM_SAMPLES = (1, 8, 16, 4, 2)
"""Guided samples of a call; what matters most comes first."""


class OneAttention(TorchOperations):
    """PyTorch's attention by one of its implementations."""

    def __init__(self, backend: SDPBackend) -> None:
        self._backend = backend

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(self._backend):
            return super().attention(query, key, value)


ATTENTIONS: Mapping[str, Operations] = {
    "memory efficient": OneAttention(SDPBackend.EFFICIENT_ATTENTION),
    "flash": OneAttention(SDPBackend.FLASH_ATTENTION),
    "cudnn": OneAttention(SDPBackend.CUDNN_ATTENTION),
}


class OutOfTimeError(Exception):
    """The budget is used up; the file holds what was measured."""


CONVOLUTIONS = {"cudnn's choice": False, "cudnn.benchmark": True}


def time_call(call: Callable[[], object], time_ms: Callable[[Callable[[], object]], float]) -> dict[str, Any]:
    """A call in both ways, each in a thread of its own: cuDNN keeps for a thread and a shape what it has taken first.

    `first_s` is what the first call takes, in which it looks.
    """
    found: dict[str, dict[str, float]] = {"ms": {}, "first_s": {}}

    def run(name: str) -> None:
        with torch.no_grad(), torch.backends.cudnn.flags(benchmark=CONVOLUTIONS[name]):
            start = time.monotonic()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found["first_s"][name] = round(time.monotonic() - start, 3)
            found["ms"][name] = time_ms(call)

    for name in CONVOLUTIONS:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(run, name).result()
    return found


def measure(
    model: Any,
    device: Device,
    *,
    about: Mapping[str, Any],
    out: Path,
    budget_s: float,
    num_samples: tuple[int, ...] = NUM_SAMPLES,
) -> dict[str, Any]:
    """What the file holds afterwards."""
    ends = time.monotonic() + budget_s
    pipeline = model.pipeline
    measuring = MeasuringOperations({**device.ways, **ATTENTIONS}, device.time_ms)
    calls: list[dict[str, Any]] = []
    if out.exists() and (before := json.loads(out.read_text())).get("about") == about:
        known = choice_from(before)
        measuring.take(known.measurements, known.refused)
        calls += before["calls"]

    def written(measurement: Measurement | None = None) -> dict[str, Any]:
        rows = [{**asdict(one), "fastest": one.fastest} for one in measuring.measurements]
        found = {
            "about": dict(about),
            "device": device.name,
            "measurements": rows,
            "refused": measuring.refused,
            "calls": calls,
        }
        out.write_text(json.dumps(found, indent=1) + "\n")
        if time.monotonic() > ends:
            raise OutOfTimeError
        return found

    def time_whole(what: str, count: int, make: Callable[[Operations], Callable[[], object]]) -> None:
        if not any((one["what"], one["num_samples"]) == (what, count) for one in calls):
            choice = Choice(device=device.name, measurements=tuple(measuring.measurements))
            timed = time_call(make(ChosenOperations(choice, measuring.ways)), device.time_ms)
            calls.append({"what": what, "num_samples": count, **timed})
            written()

    measuring.after = written
    try:
        with torch.no_grad():
            pipeline.unet.to(memory_format=torch.channels_last)
            pipeline.vae.decoder.to(memory_format=torch.channels_last)
            inputs = PassInputs.of(model)
            kernels = FusedKernels(pipeline.unet, measuring)
            latents = inputs.latents(1, pipeline.vae.config.latent_channels)
            for index, count in enumerate(num_samples):
                try:
                    inputs.prediction(kernels, count)
                    inputs.sample(measuring, device.samplers, count)
                    time_whole("UNet call", count, lambda way, n=count: inputs.call(FusedKernels(pipeline.unet, way), n))
                except torch.OutOfMemoryError:
                    print(f"no memory for {count} samples beside their check")
                if index == 0:
                    FusedDecoder(pipeline.vae.decoder, measuring)(latents)
                    time_whole("decode", 1, lambda way: partial(FusedDecoder(pipeline.vae.decoder, way), latents))
    except OutOfTimeError:
        print("no time left; run it again for the rest")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def table(found: Mapping[str, Any]) -> str:
    """One line for each shape."""
    lines = [
        f"{one['operation']:13} {'×'.join(map(str, (one['size'], *one['shape']))):28} "
        + ", ".join(f"{way} {1000 * ms:.1f}" for way, ms in sorted(one["ms"].items(), key=lambda way: way[1]))
        for one in found["measurements"]
    ]
    lines += [
        f"{one['what']} of {one['num_samples']}: " + ", ".join(f"{way} {1000 * ms:.1f}" for way, ms in one["ms"].items())
        for one in found["calls"]
    ]
    return "\n".join(
        ["microseconds, the fastest first", *lines, *(f"not {what}: {why}" for what, why in found["refused"].items())]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=480.0, metavar="SECONDS")
    parser.add_argument("--out", type=Path, help="the JSON file to write; named after the device when left out")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here to time kernels on")
    limits = DeployConfig.load({"model": RANDOM_SD_V1_4}).limits
    model = load_model(RANDOM_SD_V1_4, revision=None, dtype="fp16", device="cuda", limits=limits, enable_safety_checker=False)
    device = this_device(torch.device("cuda"))
    name = "".join(letter if letter.isalnum() else "-" for letter in device.name).lower()
    seen = environment.circumstances((*environment.PACKAGES, "triton"))
    about = {**device.about, "commit": seen["commit"], "model": RANDOM_SD_V1_4, "dtype": "fp16"}
    out = arguments.out or RESULTS / f"kernel-times-{name}.json"
    print(table(measure(model, device, about=about, out=out, budget_s=arguments.budget)))
    print(f"written to {out}")


if __name__ == "__main__":
    main()

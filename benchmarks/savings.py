#!/usr/bin/env python3
"""What each exact saving of the native engine's UNet call is worth, one at a time and together.

    python benchmarks/savings.py                            the built-in model, under a minute on two CPU cores
    python benchmarks/savings.py --model random-sd-v1-4     full size; for a GPU

The peer is `UNet2DConditionModel.forward` on the same guided batch. The variants take turns, call by call, so that a busy
machine is busy for all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engines import circumstances

from mii_serve.config import DeployConfig
from mii_serve.engine.kernels.native import NativeKernels
from mii_serve.models import load_model

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 2, 4, 8, 16)


def variants(unet: Any, num_samples: int, side: int) -> dict[str, Callable[[], object]]:
    device, dtype = unet.device, unet.dtype
    generator = torch.Generator("cpu").manual_seed(0)
    latents = torch.randn(num_samples, 4, side, side, generator=generator).to(device, dtype)
    times = (torch.rand(num_samples, generator=generator) * 999).to(device)
    embeds = torch.randn(2 * num_samples, 77, unet.config.cross_attention_dim, generator=generator).to(device, dtype)
    pairs = torch.arange(num_samples, device=device).repeat(2)
    kernels = NativeKernels(unet)
    time_rows, key_values = kernels.embed_timesteps(times), kernels.project_prompts(embeds)

    def diffusers() -> object:
        return unet(latents[pairs], times[pairs], encoder_hidden_states=embeds, return_dict=False)

    def no_saving() -> object:
        return kernels.predict_noise(latents[pairs], kernels.embed_timesteps(times[pairs]), kernels.project_prompts(embeds))

    def prompts_kept() -> object:
        return kernels.predict_noise(latents[pairs], kernels.embed_timesteps(times[pairs]), key_values)

    def times_kept() -> object:
        return kernels.predict_noise(latents[pairs], time_rows[pairs], kernels.project_prompts(embeds))

    def pair_shared() -> object:
        return kernels.predict_noise(latents, kernels.embed_timesteps(times), kernels.project_prompts(embeds), pairs)

    def together() -> object:
        return kernels.predict_noise(latents, time_rows, key_values, pairs)

    made = (diffusers, no_saving, prompts_kept, times_kept, pair_shared, together)
    return {variant.__name__: variant for variant in made}


def measure(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each."""
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 5):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 5:  # the first ones warm up
                seen[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "fp16" if device.type == "cuda" else "fp32"
    limits = DeployConfig.load({"model": arguments.model}).limits
    model = load_model(arguments.model, revision=None, dtype=dtype, device=str(device), limits=limits)
    unet = model.pipeline.unet.to(memory_format=torch.channels_last)
    rows = []
    with torch.inference_mode():
        for num_samples in BATCHES:
            calls = variants(unet, num_samples, model.defaults.height // 8)
            median_ms = measure(calls, arguments.repeats, device)
            ratios = {name: round(median_ms["diffusers"] / value, 3) for name, value in median_ms.items()}
            rows.append(
                {"guided_samples": num_samples, "diffusers_ms": round(median_ms["diffusers"], 3), "times_faster": ratios}
            )
            print(json.dumps(rows[-1]), flush=True)
    about = circumstances(model.name, model.revision, str(device), dtype)
    out = arguments.out or RESULTS / f"savings-{arguments.model}-{'cpu' if device.type == 'cpu' else 'gpu'}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

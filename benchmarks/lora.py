#!/usr/bin/env python3
"""What different LoRAs cost in one batch: a UNet call of 8 guided samples with 8 LoRAs, compared with the same call without.

    python benchmarks/lora.py                               on a CPU: Stable Diffusion v1-4 at 128 × 128, 3 minutes on two cores
    python benchmarks/lora.py --model demo                  the built-in model, seconds

The LoRAs are of rank 16, in all linear layers of the transformers. The two calls take turns, so that a busy machine is busy for
both. Beside it stand the computed bounds of a turn on GPUs at 512 × 512 in half precision (see `roofline.py`). It
has not run on one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import traced_turns
from roofline import PEAKS

from mii_serve.bench import environment
from mii_serve.config import DeployConfig
from mii_serve.engine.kernels.loras import LoraRows
from mii_serve.engine.kernels.native import NativeKernels
from mii_serve.models import load_model

RESULTS = Path(__file__).parent / "results" / "lora.json"
NUM_SAMPLES, RANK = 8, 16


def measured(model: str, side: int, num_rounds: int) -> dict[str, Any]:
    settings = DeployConfig.load({"model": model})
    unet = load_model(model, revision=None, dtype="fp32", device="cpu", limits=settings.limits).pipeline.unet
    kernels, generator = NativeKernels(unet), torch.Generator().manual_seed(0)
    unet.to(memory_format=torch.channels_last)
    layout = kernels.lora_layout
    assert layout is not None

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    times = kernels.embed_timesteps(torch.linspace(999.0, 1.0, NUM_SAMPLES))
    prompts = kernels.project_prompts(random(2 * NUM_SAMPLES, 77, unet.config.cross_attention_dim))
    latents = random(NUM_SAMPLES, 4, side, side).contiguous(memory_format=torch.channels_last)
    pairs = torch.arange(NUM_SAMPLES).repeat(2)
    pool = LoraRows(layout, random(NUM_SAMPLES + 1, RANK, layout.num_inputs), random(NUM_SAMPLES + 1, RANK, layout.num_outputs))
    seconds: dict[str, list[float]] = {"none": [], "loras": []}
    with torch.inference_mode():
        for number in range(num_rounds + 1):
            for name, found in seconds.items():
                start = time.perf_counter()
                loras = pool.taken(torch.arange(NUM_SAMPLES)) if name == "loras" else None
                kernels.predict_noise(latents, times, prompts, pairs, loras)
                if number:  # the first round is a warm-up
                    found.append(time.perf_counter() - start)
    ratios = [after / before for before, after in zip(seconds["none"], seconds["loras"], strict=True)]
    return {
        "model": model,
        "latents": [side, side],
        "num_calls": num_rounds,
        "call_s": {name: round(statistics.median(found), 3) for name, found in seconds.items()},
        "cost": [round(cost - 1, 3) for cost in (statistics.median(ratios), min(ratios), max(ratios))],
    }


def computed() -> dict[str, Any]:
    none, loras = traced_turns.native_turn(NUM_SAMPLES), traced_turns.lora_turn(NUM_SAMPLES, RANK)
    return {
        "kernels": [none.num_kernels, loras.num_kernels],
        "gflop": [round(one.flops / 1e9, 1) for one in (none, loras)],
        "gb": [round(one.num_bytes / 1e9, 2) for one in (none, loras)],
        "bound_ms": {
            device: [round(1000 * one.seconds(*peaks), 2) for one in (none, loras)] for device, peaks in PEAKS.items()
        },
        "cost": {device: round(loras.seconds(*peaks) / none.seconds(*peaks) - 1, 3) for device, peaks in PEAKS.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random-sd-v1-4")
    parser.add_argument("--side", type=int, default=16, help="height and width of the latents")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = {
        **environment.circumstances(environment.PACKAGES),
        "num_samples": NUM_SAMPLES,
        "rank": RANK,
        "computed": computed(),
        "measured": measured(arguments.model, arguments.side, arguments.rounds),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("computed", "measured")}, indent=1))


if __name__ == "__main__":
    main()

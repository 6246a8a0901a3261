#!/usr/bin/env python3
"""Time the engines offline on one machine, and write the figures with everything needed to repeat them.

    python benchmarks/engines.py                        full-size v1-4 with random weights, 512 × 512; for a GPU
    python benchmarks/engines.py --model demo --quick   the built-in model, seconds on two CPU cores

For each engine, sampler and number of images at once: the median seconds of a whole burst over the repeats, seconds per image,
UNet calls per second, and the peak memory of the device. The reference engine makes one image at a time, so its time per image
does not depend on the burst; it is the baseline the batched engine is divided by.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

import mii_serve
from mii_serve.config import DeployConfig
from mii_serve.engine import Engine
from mii_serve.engine.factory import build_engine
from mii_serve.types import GenerationParams, RequestedParams, Sample, SampleId, StepPlan

SAMPLERS = (("pndm", 50), ("dpm++_2m", 25))
BATCHES = (1, 2, 4, 8, 16)
RESULTS = Path(__file__).parent / "results"


def burst(engine: Engine, params: GenerationParams, num_images: int, max_slots: int) -> int:
    """Make the images, at most `max_slots` at once; answers how many UNet calls that took."""
    waiting = [Sample(id=SampleId("benchmark", i), params=params) for i in range(num_images)]
    calls_left: dict[SampleId, int] = {}
    num_calls, num_steps = engine.check(params), 0
    while waiting or calls_left:
        joins = tuple(waiting.pop(0) for _ in range(min(len(waiting), max_slots - len(calls_left))))
        calls_left |= {sample.id: num_calls for sample in joins}
        steps = tuple(sample_id for sample_id, left in calls_left.items() if left)
        ended = [sample_id for sample_id, left in calls_left.items() if left <= 1]
        decodes = tuple(ended[: engine.capacity.max_decodes])
        engine.run(StepPlan(joins=joins, steps=steps, decodes=decodes))
        num_steps += len(steps)
        calls_left = {sample_id: max(0, left - 1) for sample_id, left in calls_left.items() if sample_id not in decodes}
    return num_steps


def measure(engine: Engine, max_slots: int, sampler: str, num_steps: int, num_images: int, repeats: int) -> dict[str, Any]:
    asked = RequestedParams(
        prompt="a red circle on a blue background", scheduler=sampler, num_inference_steps=num_steps, seed=1
    )
    params = engine.capabilities.resolve(asked, fallback_seed=0)
    burst(engine, params, num_images, max_slots)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times, calls = [], 0
    for _ in range(repeats):
        start = time.perf_counter()
        calls = burst(engine, params, num_images, max_slots)
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    return {
        "engine": engine.description.engine,
        "sampler": sampler,
        "num_inference_steps": num_steps,
        "num_images": num_images,
        "median_s": round(median, 4),
        "min_s": round(min(times), 4),
        "max_s": round(max(times), 4),
        "s_per_image": round(median / num_images, 4),
        "unet_calls_per_s": round(calls / median, 2),
        "peak_memory_mib": torch.cuda.max_memory_allocated() // 2**20 if torch.cuda.is_available() else None,
    }


def circumstances(model: str, model_revision: str, device: str, dtype: str) -> dict[str, Any]:
    """What a reader needs to repeat a measurement."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    on_gpu = device.startswith("cuda")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or None,
        "command": shlex.join(sys.argv),
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "model": model,
        "model_revision": model_revision,
        "dtype": dtype,
        "versions": {
            "mii_serve": mii_serve.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random-sd-v1-4")
    parser.add_argument("--engines", nargs="+", default=["native", "reference"], choices=["native", "reference"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one small burst, to see that everything runs")
    parser.add_argument("--out", type=Path, help="the JSON file to write; named after device and model when left out")
    arguments = parser.parse_args()

    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    for name in arguments.engines:
        engine = build_engine(DeployConfig.load({"model": arguments.model, "engine": name}))
        engine.warmup()
        max_slots = engine.capacity.max_slots
        told = engine.description
        about = circumstances(arguments.model, told.model_revision, told.device, told.dtype)
        for sampler, num_steps in (("pndm", 5),) if arguments.quick else SAMPLERS:
            for num_images in (1, 2) if arguments.quick else BATCHES:
                # One image at a time, a longer burst tells nothing that a shorter one does not.
                if num_images > max_slots and num_images > 2:
                    continue
                rows.append(
                    measure(engine, max_slots, sampler, num_steps, num_images, 1 if arguments.quick else arguments.repeats)
                )
                print(json.dumps(rows[-1]), flush=True)
        engine.close()

    device = "".join(c if c.isalnum() else "-" for c in about["device"]).lower()
    out = arguments.out or RESULTS / f"engines-{arguments.model}-{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()

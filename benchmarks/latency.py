#!/usr/bin/env python3
"""What serving costs: seconds per picture over gRPC, beside the plain diffusers pipeline on the same weights in the same run.

    python benchmarks/latency.py                    the built-in model with its own defaults, one caller at a time

The two take turns, picture by picture, so that whatever else the machine does meets both. The ratio is the claim, not the
seconds.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from engines import circumstances

import mii_serve.models
from mii_serve.client import Client
from mii_serve.samplers.names import SAMPLERS

PROMPT = "a red circle on a blue background"
DEMO = Path(mii_serve.models.__file__).parent / "demo"


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def plain_pipeline(sampler: str) -> Any:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(DEMO)
    if sampler in SAMPLERS:
        spec = SAMPLERS[sampler]
        pipeline.scheduler = getattr(diffusers, spec.class_name).from_config(pipeline.scheduler.config, **spec.overrides)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure(target: str, repeats: int) -> dict[str, Any]:
    with Client(target) as client:
        info = client.server_info()
        defaults = info.defaults
        pipeline = plain_pipeline(defaults.scheduler)
        arguments = {
            "num_inference_steps": defaults.num_inference_steps,
            "guidance_scale": defaults.guidance_scale,
            "height": defaults.height,
            "width": defaults.width,
        }
        served, plain = [], []
        for seed in range(repeats + 1):  # the first one only warms up
            served.append(timed(lambda seed=seed: client.generate(PROMPT, seed=seed)))
            generator = torch.Generator().manual_seed(seed)
            plain.append(timed(lambda generator=generator: pipeline(PROMPT, generator=generator, **arguments)))
    ratios = [a / b for a, b in zip(served[1:], plain[1:], strict=True)]
    return {
        **circumstances(info.model, info.model_revision, info.device, info.dtype),
        "scheduler": defaults.scheduler,
        **arguments,
        "num_pictures": repeats,
        "served_median_s": round(statistics.median(served[1:]), 4),
        "served_max_s": round(max(served[1:]), 4),
        "pipeline_median_s": round(statistics.median(plain[1:]), 4),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "latency-demo.json")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "mii_serve", "deploy", "demo", "--grpc-port", "0", "--http-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            match = re.match(r"ready grpc=(\S+)", server.stdout.readline())
            if match is None:
                sys.exit("the deployment did not start")
            result = measure(match[1], arguments.repeats)
        finally:
            server.send_signal(signal.SIGTERM)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

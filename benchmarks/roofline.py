#!/usr/bin/env python3
"""Kernels, floating-point operations, bytes and the bound they set on the time, of one turn on a GPU that need not be there.

    python benchmarks/roofline.py        under a minute on a CPU

Nothing is timed. Each row is traced with fake CUDA tensors (`cuda_trace.py` and `modelled_deepspeed.py` say what of it is
modelled); its bound on a device is the sum over all kernels of the longer of arithmetic and bytes at the device's published
peaks. A real turn takes longer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import traced_engine
import traced_turns
from cuda_trace import Record

from mii_serve.bench import environment

RESULTS = Path(__file__).parent / "results" / "roofline.json"

PEAKS = {"A100": (312e12, 2.039e12), "H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
"""Dense half-precision operations and bytes a second, of the SXM cards, from NVIDIA's data sheets."""

TURNS: dict[str, Callable[[int], Record]] = {
    "native": traced_turns.native_turn,
    "native, unfused": traced_turns.unfused_turn,
    "deepspeed": traced_turns.deepspeed_turn,
    "deepspeed, unfused": lambda n: traced_turns.deepspeed_turn(n, is_fused=False),
    "diffusers, NCHW": lambda n: traced_turns.diffusers_call(n, is_channels_last=False),
    "diffusers, NHWC": lambda n: traced_turns.diffusers_call(n, is_channels_last=True),
}
DECODES: dict[str, Callable[[], Record]] = {
    "native": traced_turns.native_decode,
    "diffusers": traced_turns.diffusers_decode,
}
NUM_SAMPLES = (1, 8, 16)


def figures(record: Record) -> dict[str, Any]:
    return {
        "kernels": record.num_kernels,
        "gflop": round(record.flops / 1e9, 1),
        "gb": round(record.num_bytes / 1e9, 2),
        "layout_conversions": len(record.layout_conversions),
        "waits": sum(record.waits.values()),
        "in_float64": len(record.in_float64),
        "peak_activations_gib": round(record.peak_bytes / 2**30, 2),
        "bound_ms": {device: round(1000 * record.seconds(*peaks), 2) for device, peaks in PEAKS.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--by-name", action="store_true", help="what each kind of operation takes in a turn of one sample")
    arguments = parser.parse_args()
    if arguments.by_name:
        for name, num_kernels, num_bytes in traced_turns.native_turn(1).by_name():
            print(f"{name:44}{num_kernels:5} kernels {num_bytes / 1e6:9.1f} MB")
        return
    rows: list[dict[str, Any]] = []
    for name, trace_turn in TURNS.items():
        for num_samples in NUM_SAMPLES:
            rows.append({"row": name, "what": "turn", "num_samples": num_samples, **figures(trace_turn(num_samples))})
            print(json.dumps(rows[-1]), flush=True)
    for name, trace_decode in DECODES.items():
        rows.append({"row": name, "what": "decode", "num_samples": 1, **figures(trace_decode())})
        print(json.dumps(rows[-1]), flush=True)
    for name, record in traced_engine.unsteady().items():
        rows.append({"row": name, "what": "unsteady", "num_samples": 2 - name.startswith("a guided"), **figures(record)})
        print(json.dumps(rows[-1]), flush=True)
    about = environment.circumstances((*environment.PACKAGES, "triton"))
    arguments.out.write_text(json.dumps({**about, "model": "v1-4", "dtype": "fp16", "rows": rows}, indent=1) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""The native engine beside diffusers on a CPU, burst by burst in turn, so that both meet the same machine.

    GOMP_SPINCOUNT=2500 python benchmarks/engines_in_turn.py        the built-in model on this machine, about five minutes

`engines.py` measures one row after another; where the speed of the machine changes within minutes, as on shared cores, that
decides between two rows that are near each other. Here every round makes one burst of each, and what counts is the ratio of the
two within a round. Each burst has a prompt of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from engine_rows import Place, Row, opened
from engines import circumstances

from mii_serve.types import RequestedParams

NAMES = ("native", "diffusers_eager")
NUM_IMAGES = (1, 2, 4, 8, 12, 16)
RESULTS = Path(__file__).parent / "results"


def burst_s(row: Row, num_images: int, num_steps: int, number: int) -> float:
    prompt = f"a red circle on a blue background, {num_images} {number}"
    asked = RequestedParams(prompt=prompt, scheduler="dpm++_2m", num_inference_steps=num_steps, seed=1)
    start = time.perf_counter()
    pictures = row.burst(asked, num_images)
    assert len(pictures) == num_images
    return time.perf_counter() - start


def in_turn(rows: dict[str, Row], num_images: int, num_steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of each row, and how much longer the second takes than the first within a round."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(-1, rounds):  # the first one warms up
        names = list(rows) if number % 2 else list(reversed(rows))
        for name in names:
            elapsed_s = burst_s(rows[name], num_images, num_steps, number)
            if number >= 0:
                seconds[name].append(elapsed_s)
    ours, other = (seconds[name] for name in NAMES)
    ratios = [b / a for a, b in zip(ours, other, strict=True)]
    return {
        "num_images": num_images,
        "median_s": {name: round(statistics.median(each), 4) for name, each in seconds.items()},
        "min_s": {name: round(min(each), 4) for name, each in seconds.items()},
        "ratio": {name: round(f(ratios), 3) for name, f in (("median", statistics.median), ("min", min), ("max", max))},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--num-images", type=int, nargs="+", default=NUM_IMAGES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "engines-in-turn-demo.json")
    arguments = parser.parse_args()
    load_before = os.getloadavg()
    place = Place(model=arguments.model, device="cpu", dtype="fp32")
    with contextlib.ExitStack() as held:
        rows = {name: held.enter_context(opened(name, place)) for name in NAMES}
        found = []
        for num_images in arguments.num_images:
            found.append(in_turn(rows, num_images, arguments.num_inference_steps, arguments.rounds))
            print(json.dumps(found[-1]), flush=True)
    about = circumstances(arguments.model, "", "cpu", "fp32")
    about["load_average"] = [round(load, 1) for load in load_before]  # of what else the machine does
    result = {**about, "num_inference_steps": arguments.num_inference_steps, "rounds": arguments.rounds, "rows": found}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

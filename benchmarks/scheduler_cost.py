#!/usr/bin/env python3
"""What deciding costs: the time of one `plan` and one `advance`, without an engine.

    python benchmarks/scheduler_cost.py             seconds on one core

All slots stay busy, and as many samples wait as given: whoever ends is replaced by a new request, which is timed apart.
Callers, priorities, step counts and two sizes are mixed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from mii_serve.bench import environment
from mii_serve.scheduler import Scheduler
from mii_serve.types import EngineCapacity, GenerationParams, Picture, Priority, Request, SampleId, SampleProgress, StepPlan

RESULTS = Path(__file__).parent / "results"
SIZES = ((8, 0), (16, 50), (64, 500))
"""Slots, and samples that wait."""
PICTURE = Picture(width=8, height=8, rgb=b"", nsfw_content_detected=None)


def new_request(name: str, rng: random.Random) -> Request:
    side = rng.choice([64, 96])
    params = GenerationParams(
        prompt="p",
        negative_prompt="",
        height=side,
        width=side,
        num_inference_steps=rng.choice([10, 20, 30, 50]),
        guidance_scale=7.5,
        num_images_per_prompt=1,
        scheduler="pndm",
        seed=0,
    )
    client = f"client {rng.randint(0, 19)}"
    return Request(
        id=name, params=params, num_calls=params.num_inference_steps, client=client, priority=rng.choice(list(Priority))
    )


class CountingEngine:
    """Answers what an engine would, from a count per sample."""

    def __init__(self, calls: dict[str, int]) -> None:
        self._calls = calls
        self._steps: dict[SampleId, int] = {}

    def run(self, plan: StepPlan) -> list[SampleProgress]:
        made = []
        for sample_id in plan.steps:
            step = self._steps[sample_id] = self._steps.get(sample_id, 0) + 1
            made.append(SampleProgress(id=sample_id, step=step, num_steps=self._calls[sample_id.request_id]))
        return made


def measure(num_slots: int, num_waiting: int, num_turns: int) -> dict[str, Any]:
    rng, names = random.Random(0), (f"r{i}" for i in itertools.count())
    calls: dict[str, int] = {}
    scheduler = Scheduler(EngineCapacity(max_slots=num_slots, max_decodes=4), max_waiting_samples=10**6, max_waiting_s=1e9)
    engine = CountingEngine(calls)

    def arrive() -> None:
        request = new_request(next(names), rng)
        calls[request.id] = request.num_calls
        scheduler.add(request, 0.0)

    for _ in range(num_slots + num_waiting):
        arrive()
    turns, arrivals = [], []
    while len(turns) < num_turns:
        start = time.perf_counter()
        plan = scheduler.plan()
        planned = time.perf_counter()
        assert plan is not None
        progress = engine.run(plan)
        done = {sample_id for sample_id in plan.decodes if sample_id not in plan.steps}
        progress = [ended(made) if made.id in plan.decodes else made for made in progress]
        progress += [ended(SampleProgress(id=i, step=calls[i.request_id], num_steps=calls[i.request_id])) for i in done]
        before = time.perf_counter()
        scheduler.advance(progress, 0.01)
        turns.append(1e6 * (planned - start + time.perf_counter() - before))
        for _ in plan.decodes:
            before = time.perf_counter()
            arrive()
            arrivals.append(1e6 * (time.perf_counter() - before))
    cuts = statistics.quantiles(turns, n=100)
    return {
        "num_slots": num_slots,
        "num_waiting": num_waiting,
        "turn_us": {"median": round(cuts[49], 1), "p95": round(cuts[94], 1), "p99": round(cuts[98], 1)},
        "add_us": {"median": round(statistics.median(arrivals), 1)},
    }


def ended(progress: SampleProgress) -> SampleProgress:
    return replace(progress, picture=PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=RESULTS / "scheduler-cost.json")
    arguments = parser.parse_args()
    rows = [measure(slots, waiting, arguments.turns) for slots, waiting in SIZES]
    for row in rows:
        print(json.dumps(row))
    about = environment.circumstances()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**about, "turns": arguments.turns, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

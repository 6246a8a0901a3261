#!/usr/bin/env python3
"""What a flood of batch requests does to everybody else: this server's scheduler under virtual time.

    python benchmarks/batch_share.py                a minute on one core

Requests for one image of 51 UNet calls arrive at random times (Poisson) at several rates. Beside them there is nothing, a flood
of requests of the priority low, or a flood of the priority batch; a flood always has as many requests as there are slots. A
turn takes a fixed time and a time for each image in it, and one turn is planned while one runs. With buckets, a turn takes as
long as the declared bucket that its images are padded to, and batch requests fill the padding.

The times of a turn are a model of a GPU, not a measurement; decoding takes none.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections import deque
from pathlib import Path
from typing import Any

from mii_serve.bench import environment
from mii_serve.bench.statistics import percentile
from mii_serve.engine.batched.buckets import declare_buckets
from mii_serve.scheduler import Scheduler
from mii_serve.types import (
    BatchShape,
    EngineCapacity,
    GenerationParams,
    Picture,
    Priority,
    Request,
    SampleId,
    SampleProgress,
    StepPlan,
    choose_bucket,
)

RESULTS = Path(__file__).parent / "results"
NUM_SLOTS, NUM_CALLS, MAX_DECODES = 16, 51, 4
TURN_S, IMAGE_S = 0.003, 0.0045
"""A turn of n images takes TURN_S + n * IMAGE_S."""
RATES = (0.3, 1.0, 2.0, 3.0)
"""Interactive requests per second; 16 images at once are 4.2 a second."""
PARAMS = GenerationParams(
    prompt="p",
    negative_prompt="",
    height=512,
    width=512,
    num_inference_steps=50,
    guidance_scale=7.5,
    num_images_per_prompt=1,
    scheduler="pndm",
    seed=0,
)
PICTURE = Picture(width=512, height=512, rgb=b"", nsfw_content_detected=None)


class Run:
    """One replica in virtual time."""

    def __init__(self, rate: float, flood: Priority | None, *, has_buckets: bool, batch_share: float, seed: int) -> None:
        buckets = declare_buckets(NUM_SLOTS, *PARAMS.latent_shape) if has_buckets else ()
        capacity = EngineCapacity(max_slots=NUM_SLOTS, max_decodes=MAX_DECODES, buckets=buckets)
        self._scheduler = Scheduler(capacity, max_waiting_samples=10**6, max_waiting_s=1e9, batch_share=batch_share)
        self._buckets, self._flood, self._rate, self._random = buckets, flood, rate, random.Random(seed)
        self._planned: deque[StepPlan] = deque()
        """The turn that runs, and the one that is prepared."""
        self._steps: dict[SampleId, int] = {}
        self._arrived: dict[str, float] = {}
        self._numbers = itertools.count()
        self._num_flood = 0
        self.latencies: list[float] = []
        self.num_batch = 0
        self.now = 0.0

    def until(self, end_s: float) -> None:
        next_arrival = self._random.expovariate(self._rate)
        while self.now < end_s:
            while next_arrival <= self.now:
                name = f"i{next(self._numbers)}"
                self._arrived[name] = next_arrival
                self._add(name, Priority.NORMAL, f"client {next(self._numbers) % 20}")
                next_arrival += self._random.expovariate(self._rate)
            while self._flood is not None and self._num_flood < NUM_SLOTS:
                self._num_flood += 1
                self._add(f"b{next(self._numbers)}", self._flood, "flood")
            if (plan := self._scheduler.plan()) is not None:
                self._planned.append(plan)
            if self._planned and (plan is None or len(self._planned) == 2):
                self._end_turn(self._planned.popleft())
            elif plan is None:
                self.now = max(self.now, next_arrival)

    def _end_turn(self, plan: StepPlan) -> None:
        for sample_id in plan.leaves:
            self._steps.pop(sample_id, None)
        elapsed_s = self._seconds_of(plan)
        self.now += elapsed_s
        self._scheduler.advance([self._made(sample_id, plan) for sample_id in _touched(plan)], elapsed_s)

    def _add(self, name: str, priority: Priority, client: str) -> None:
        self._scheduler.add(Request(id=name, params=PARAMS, num_calls=NUM_CALLS, client=client, priority=priority), self.now)

    def _seconds_of(self, plan: StepPlan) -> float:
        """All images are guided, and have two rows each."""
        num_rows = 2 * len(plan.steps)
        bucket = choose_bucket(self._buckets, BatchShape(len(plan.steps), num_rows, *PARAMS.latent_shape)) if num_rows else None
        return TURN_S + IMAGE_S * (num_rows if bucket is None else bucket.num_rows) / 2

    def _made(self, sample_id: SampleId, plan: StepPlan) -> SampleProgress:
        step = self._steps[sample_id] = self._steps.get(sample_id, 0) + (sample_id in plan.steps)
        if sample_id not in plan.decodes:
            return SampleProgress(id=sample_id, step=step, num_steps=NUM_CALLS)
        del self._steps[sample_id]
        if (arrived := self._arrived.pop(sample_id.request_id, None)) is not None:
            self.latencies.append(self.now - arrived)
        else:
            self.num_batch += 1
            self._num_flood -= 1
        return SampleProgress(id=sample_id, step=step, num_steps=NUM_CALLS, picture=PICTURE)

    def row(self) -> dict[str, Any]:
        return {
            "rate": self._rate,
            "flood": None if self._flood is None else self._flood.value,
            "has_buckets": bool(self._buckets),
            "p50_s": round(percentile(self.latencies, 50), 3),
            "p95_s": round(percentile(self.latencies, 95), 3),
            "interactive_per_s": round(len(self.latencies) / self.now, 3),
            "batch_per_s": round(self.num_batch / self.now, 3),
            "num_restarted": self._scheduler.batch.num_restarted,
        }


def _touched(plan: StepPlan) -> list[SampleId]:
    return list(dict.fromkeys([*plan.steps, *plan.decodes]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=400.0, help="virtual seconds of each run")
    parser.add_argument("--batch-share", type=float, default=0.02)
    parser.add_argument("--out", type=Path, default=RESULTS / "batch-share.json")
    arguments = parser.parse_args()
    rows = []
    for has_buckets, rate, flood in itertools.product((False, True), RATES, (None, Priority.LOW, Priority.BATCH)):
        run = Run(rate, flood, has_buckets=has_buckets, batch_share=arguments.batch_share, seed=1)
        run.until(arguments.seconds)
        rows.append(run.row())
        print(json.dumps(rows[-1]), flush=True)
    about = environment.circumstances()
    settings = {"seconds": arguments.seconds, "batch_share": arguments.batch_share, "num_slots": NUM_SLOTS}
    model = {"turn_s": TURN_S, "image_s": IMAGE_S}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**about, **settings, **model, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

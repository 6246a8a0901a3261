#!/usr/bin/env python3
"""In-flight batching beside the two other ways to serve, on the same engine code, under the same Poisson arrivals.

    python benchmarks/inflight.py                   the built-in model on this machine, about six minutes

    fifo        one request at a time, in order: what a server with a lock around its pipeline does
    trajectory  waiting requests with the same number of steps form a batch that runs to its end together
    in-flight   requests join and leave between steps: what this server does

Requests ask for 10, 20, 30 or 50 steps, a quarter each. Load is a fraction of the in-flight capacity, which is measured first
with everything queued at once. A latency counts from the moment the request was meant to arrive. The engine is driven directly,
without network, so that the only difference is who steps when.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from engines import circumstances

from mii_serve.config import DeployConfig
from mii_serve.engine import Engine
from mii_serve.engine.factory import build_engine
from mii_serve.scheduler import Scheduler
from mii_serve.types import (
    EngineCapacity,
    Request,
    RequestedParams,
    Sample,
    SampleId,
    SampleProgress,
    StepPlan,
)

STEP_COUNTS = (10, 20, 30, 50)
LOADS = (0.5, 0.85, 1.2)
NUM_CAPACITY_ROUNDS = 3
RESULTS = Path(__file__).parent / "results"


class Policy(Protocol):
    def add(self, request: Request, now: float) -> object: ...
    def plan(self) -> StepPlan | None: ...
    def advance(self, progress: tuple[SampleProgress, ...], elapsed_s: float) -> None: ...


class WholeTrajectories:
    """The oldest waiting request and all that wait for the same number of steps, up to a full batch; then the next batch."""

    def __init__(self, max_slots: int) -> None:
        self._max_slots = max_slots
        self._waiting: list[Request] = []
        self._batch: list[Request] = []
        self._step = 0

    def add(self, request: Request, now: float) -> None:
        self._waiting.append(request)

    def plan(self) -> StepPlan | None:
        joins: tuple[Sample, ...] = ()
        if not self._batch:
            if not self._waiting:
                return None
            alike = [r for r in self._waiting if r.num_calls == self._waiting[0].num_calls][: self._max_slots]
            self._waiting = [r for r in self._waiting if r not in alike]
            self._batch, self._step = alike, 0
            joins = tuple(Sample(id=SampleId(r.id, 0), params=r.params) for r in alike)
        steps = tuple(SampleId(r.id, 0) for r in self._batch)
        self._step += 1
        return StepPlan(joins=joins, steps=steps, decodes=steps if self._step == self._batch[0].num_calls else ())

    def advance(self, progress: tuple[SampleProgress, ...], elapsed_s: float) -> None:
        if progress and progress[0].is_over:
            self._batch = []


def in_flight(max_slots: int, max_decodes: int) -> Scheduler:
    capacity = EngineCapacity(max_slots=max_slots, max_decodes=max_decodes)
    return Scheduler(capacity, max_waiting_samples=100_000, max_waiting_s=1e9)


def requests(engine: Engine, count: int, seed: int) -> Iterator[Request]:
    """A quarter each of the step counts, shuffled."""
    counts = [STEP_COUNTS[i % len(STEP_COUNTS)] for i in range(count)]
    random.Random(seed).shuffle(counts)
    for index, num_steps in enumerate(counts):
        asked = RequestedParams(prompt="a red circle on a blue background", num_inference_steps=num_steps, seed=index)
        params = engine.capabilities.resolve(asked, fallback_seed=0)
        yield Request(id=f"r{index}", params=params, num_calls=engine.check(params))


def serve(engine: Engine, policy: Policy, arrivals: list[tuple[float, Request]]) -> dict[str, Any]:
    """Run the arrivals to their ends; times are seconds from the first one."""
    start, due, ends = time.perf_counter(), 0, {}
    turns = samples = 0
    loop_s = engine_s = 0.0
    while len(ends) < len(arrivals):
        began = time.perf_counter()
        while due < len(arrivals) and arrivals[due][0] <= began - start:
            policy.add(arrivals[due][1], began)
            due += 1
        plan = policy.plan()
        if plan is None:
            time.sleep(max(0.0, arrivals[due][0] - (time.perf_counter() - start)))
            continue
        before = time.perf_counter()
        progress = engine.run(plan)
        after = time.perf_counter()
        policy.advance(progress, after - before)
        turns, samples = turns + bool(plan.steps), samples + len(plan.steps)
        ends |= {made.id.request_id: after - start for made in progress if made.is_over}
        engine_s += after - before
        loop_s += before - began + time.perf_counter() - after
    latencies = {
        num_steps: [ends[r.id] - at for at, r in arrivals if r.params.num_inference_steps == num_steps]
        for num_steps in STEP_COUNTS
    }
    everything = [latency for some in latencies.values() for latency in some]
    return {
        "seconds": round(max(ends.values()), 2),
        "images_per_s": round(len(ends) / max(ends.values()), 3),
        "samples_per_turn": round(samples / turns, 2),
        "turn_ms": round(1000 * engine_s / turns, 2),
        "loop_share": round(loop_s / engine_s, 5),
        "latency_s": percentiles(everything),
        "latency_s_by_steps": {str(n): percentiles(some) for n, some in latencies.items()},
    }


def percentiles(values: list[float]) -> dict[str, float]:
    named = {f"p{percent}": float(np.percentile(values, percent)) for percent in (50, 90, 95, 99)}
    return {name: round(value, 3) for name, value in {"mean": statistics.mean(values), **named, "max": max(values)}.items()}


def poisson(engine: Engine, count: int, rate: float, seed: int) -> list[tuple[float, Request]]:
    rng, at, arrivals = random.Random(seed), 0.0, []
    for request in requests(engine, count, seed):
        arrivals.append((at, request))
        at += rng.expovariate(rate)
    return arrivals


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(LOADS), figsize=(12, 3.6), sharey=True)
    for axis, load in zip(axes, LOADS, strict=True):
        for row in (row for row in rows if row["load"] == load):
            means = [row["latency_s_by_steps"][str(n)]["mean"] for n in STEP_COUNTS]
            axis.plot(STEP_COUNTS, means, marker="o", label=row["policy"])
        axis.set(title=f"load {load:g} of capacity", xlabel="num_inference_steps", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean latency, s")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, default=120, help="per run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "inflight-demo.json")
    arguments = parser.parse_args()

    engine = build_engine(DeployConfig.load({"model": arguments.model, "engine": "native"}))
    engine.warmup()
    slots, decodes = engine.capacity.max_slots, engine.capacity.max_decodes
    policies: dict[str, Callable[[], Policy]] = {
        "fifo": lambda: in_flight(1, 1),
        "trajectory": lambda: WholeTrajectories(slots),
        "in-flight": lambda: in_flight(slots, decodes),
    }
    at_once = [(0.0, request) for request in requests(engine, arguments.requests // 2, arguments.seed)]
    for name in policies:  # the first pass only warms up
        serve(engine, policies[name](), at_once)
    able: dict[str, list[float]] = {name: [] for name in policies}
    for _ in range(NUM_CAPACITY_ROUNDS):  # in turn: the speed of a shared machine changes
        for name, make in policies.items():
            able[name].append(serve(engine, make(), at_once)["images_per_s"])
    capacity = {name: round(statistics.median(each), 3) for name, each in able.items()}
    print("capacity, images/s:", capacity, flush=True)
    rows = []
    for load in LOADS:
        arrivals = poisson(engine, arguments.requests, load * capacity["in-flight"], arguments.seed)
        for name, make in policies.items():
            rows.append({"load": load, "policy": name, **serve(engine, make(), arrivals)})
            print(json.dumps(rows[-1]), flush=True)
    described = engine.description
    about = circumstances(described.model, described.model_revision, described.device, described.dtype)
    result = {**about, "max_slots": slots, "num_requests": arguments.requests, "capacity_images_per_s": capacity, "rows": rows}
    result["capacity_of_rounds"] = able
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    try:
        plot(rows, arguments.out.with_suffix(".svg"))
    except ImportError:
        print("no plot: matplotlib is in the 'bench' extra")


if __name__ == "__main__":
    main()

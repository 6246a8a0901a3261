#!/usr/bin/env python3
"""What a turn costs the host: everything a replica does for a turn but the work of the device.

    python benchmarks/host_cost.py                  half a minute on one core
    python benchmarks/host_cost.py --profile 16     where the time goes, by function

The replica's loop, the scheduler and the batched engine run as they are, on the built-in model, with all slots taken by guided
samples of known prompts and timesteps. The UNet costs nothing, and each batch shape is a bucket whose replay does nothing: on a
GPU there are one copy, one launch of a captured graph and a few events in addition. Processor time of all threads on one core:
what others take does not count, and neither does waiting.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import json
import os
import pstats
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mii_serve.bench import environment
from mii_serve.config import LimitsConfig
from mii_serve.engine.batched import BatchedEngine
from mii_serve.engine.batched.batch_inputs import BatchInputs
from mii_serve.engine.batched.buckets import BatchShape
from mii_serve.engine.kernels.native import NativeKernels
from mii_serve.models import LoadedModel, load_model
from mii_serve.replica.loop import ReplicaLoop
from mii_serve.samplers.run import SamplerRun
from mii_serve.samplers.table import SamplerTable
from mii_serve.types import Event, OutputOptions, RequestedParams, ResolvedRequest

RESULTS = Path(__file__).parent / "results"
NUM_SAMPLES = (1, 4, 8, 16)
SIDE_PX, NUM_STEPS, SCHEDULER = 64, 900, "ddim"
NUM_WARM_UP_TURNS = 30


class Unread:
    """Reads no events."""

    def put(self, entry: Event | Exception) -> None:
        pass


class FreeKernels(NativeKernels):
    """Predicts nothing, at no cost."""

    def predict_noise(self, model_input: torch.Tensor, *arguments: Any) -> torch.Tensor:
        prompts: torch.Tensor = arguments[1]
        return model_input.new_zeros(1).expand(len(prompts), *model_input.shape[1:])


def engine_of(model: LoadedModel, num_samples: int) -> BatchedEngine:
    """An engine whose one bucket is a batch of so many guided samples, and whose replay does nothing."""
    side = SIDE_PX // 8
    bucket = BatchShape(num_samples, 2 * num_samples, side, side)
    engine = BatchedEngine(model, FreeKernels(model.pipeline.unet), max_slots=num_samples, buckets=[bucket])
    denoiser = engine._denoiser

    def record(inputs: BatchInputs) -> tuple[Callable[[], None], tuple[torch.Tensor, torch.Tensor]]:
        outputs = torch.zeros_like(inputs.noise), torch.zeros_like(inputs.noise)
        return (lambda: None), outputs

    denoiser._record = record  # type: ignore[method-assign]
    with torch.inference_mode():
        denoiser.prepare()
        sampling = engine._samplings.of(SamplerRun(SCHEDULER, NUM_STEPS))
        assert isinstance(sampling, SamplerTable)
        engine._timesteps.rows([float(timestep) for timestep in sampling.timesteps])
    return engine


async def turns_of(engine: BatchedEngine, thread: ThreadPoolExecutor, num_turns: int, num_runs: int) -> list[float]:
    """Processor time of a turn in milliseconds, one for each run of so many turns."""
    loop = ReplicaLoop(engine, thread, max_waiting_samples=100)
    turns = asyncio.create_task(loop.run())
    asked = RequestedParams(
        prompt="a", num_inference_steps=NUM_STEPS, scheduler=SCHEDULER, seed=1, height=SIDE_PX, width=SIDE_PX
    )
    params = engine.capabilities.resolve(asked, fallback_seed=0)
    for index in range(engine.capacity.max_slots):
        await loop.submit(f"r{index}", ResolvedRequest(params=params, output=OutputOptions()), Unread())

    def is_busy() -> bool:
        activity = loop.activity()
        return activity.num_running + activity.num_waiting > 0

    async def reach(count: int) -> tuple[int, float]:
        while loop.activity().num_turns < count:
            assert not turns.done() and is_busy(), "the requests have ended before the runs"
            await asyncio.sleep(0.01)
        return loop.activity().num_turns, time.process_time()

    costs = []
    before, cpu_before_s = await reach(NUM_WARM_UP_TURNS)
    for _ in range(num_runs):
        now, cpu_s = await reach(before + num_turns)
        costs.append(1e3 * (cpu_s - cpu_before_s) / (now - before))
        before, cpu_before_s = now, cpu_s
    turns.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await turns
    assert engine.num_graph_misses == 0
    return costs


def measure(model: LoadedModel, num_samples: int, num_turns: int, num_runs: int, thread: ThreadPoolExecutor) -> dict[str, Any]:
    engine = engine_of(model, num_samples)
    costs = asyncio.run(turns_of(engine, thread, num_turns, num_runs))
    engine.close()
    return {"num_samples": num_samples, "cpu_ms": {"median": round(statistics.median(costs), 3), "least": round(min(costs), 3)}}


def profile(model: LoadedModel, num_samples: int, num_turns: int) -> None:
    """Of both threads, each with its own profiler."""
    of_loop, of_engine = cProfile.Profile(), cProfile.Profile()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(of_engine.enable).result()
        engine = engine_of(model, num_samples)
        of_loop.enable()
        asyncio.run(turns_of(engine, thread, num_turns, 1))
        of_loop.disable()
        thread.submit(of_engine.disable).result()
        engine.close()
    for profiler in (of_loop, of_engine):
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=100, help="turns of a run; a row has the median of its runs")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--samples", type=int, nargs="+", default=list(NUM_SAMPLES))
    parser.add_argument("--profile", type=int, metavar="SAMPLES", help="print where the time goes, and measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "host-cost.json")
    asked = parser.parse_args(arguments)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    model = load_model("demo", revision=None, dtype="fp32", device="cpu", limits=LimitsConfig())
    if asked.profile:
        profile(model, asked.profile, asked.turns)
        return
    about = environment.circumstances()
    with ThreadPoolExecutor(1) as thread:
        rows = [measure(model, count, asked.turns, asked.runs, thread) for count in asked.samples]
    for row in rows:
        print(json.dumps(row))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps({**about, "turns": asked.turns, "runs": asked.runs, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

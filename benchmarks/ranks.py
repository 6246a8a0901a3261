#!/usr/bin/env python3
"""One replica on several devices: the time of a UNet call by what its ranks split, and what they send and hold.

    python benchmarks/ranks.py                              the built-in model on two CPU cores, a minute
    python benchmarks/ranks.py --model random-sd-v1-4       full size; for a machine with two GPUs
    python benchmarks/ranks.py --model random-sd-v1-4 --ranks 4

One rank is compared with `rows` and `tensor` over N ranks, each a process group of its own. They take turns, a few UNet calls
each, so that a busy machine is busy for all of them, and sleep otherwise. Samples are guided and have the model's default size.
A call is a turn of the engine: the UNet call, guidance and the sampler's step. On a CPU each rank has one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mii_serve.bench import environment
from mii_serve.errors import MiiServeError

RESULTS = Path(__file__).parent / "results"
MODES = ("one rank", "rows", "tensor")


def serve(mode: str, arguments: argparse.Namespace) -> None:
    """In a process of its own: an answer on stdout for each order on stdin, `calls SAMPLES CALLS` or `memory`."""
    import torch

    from mii_serve.config import DeployConfig
    from mii_serve.engine.ranks.leader import RankedEngine
    from mii_serve.engine.ranks.order import memory_bytes
    from mii_serve.models.quiet import quiet_libraries
    from mii_serve.replica.local import build_warm_engine

    settings: dict[str, Any] = {"model": arguments.model, "engine": "native", "device": arguments.device}
    settings |= {"max_slots": max(arguments.samples), "enable_safety_checker": False}
    if mode != "one rank":
        settings |= {"tensor_parallel": arguments.ranks, "parallelism": mode}
    try:
        with quiet_libraries():
            engine = build_warm_engine(DeployConfig.load(settings))
    except MiiServeError as error:
        print(json.dumps({"skipped": str(error)}), flush=True)
        return
    group = engine.group if isinstance(engine, RankedEngine) else None
    described, defaults = engine.description, engine.capabilities.defaults
    is_cuda = described.device.startswith("cuda")
    name = torch.cuda.get_device_name() if is_cuda else ""
    size = {"height": defaults.height, "width": defaults.width}
    print(json.dumps({"device": name, "dtype": described.dtype, **size}), flush=True)
    for line in sys.stdin:
        order, *numbers = line.split()
        if order == "memory":
            held = engine.memory_bytes() if isinstance(engine, RankedEngine) else [memory_bytes(described.device)]
            print(json.dumps(held), flush=True)
        else:
            print(json.dumps(timed(engine, group, is_cuda, *map(int, numbers))), flush=True)
    engine.close()


def timed(engine: Any, group: Any, is_cuda: bool, num_samples: int, num_calls: int) -> dict[str, Any]:
    """Milliseconds of each call with that many guided samples, and what rank 0 sent in all of them."""
    import torch

    from mii_serve.types import RequestedParams, Sample, SampleId, StepPlan

    asked = RequestedParams(
        prompt="a red circle", num_inference_steps=num_calls + 1, scheduler="euler", guidance_scale=7.5, seed=1
    )
    params = engine.capabilities.resolve(asked, fallback_seed=0)
    samples = tuple(Sample(id=SampleId("ranks", index), params=params) for index in range(num_samples))
    ids = tuple(sample.id for sample in samples)
    engine.run(StepPlan(joins=samples, steps=ids))  # with the text encoder, and warms up
    before = (group.num_collectives, group.num_sent_bytes) if group else (0, 0)
    times = []
    for _ in range(num_calls):
        start = time.perf_counter()
        engine.run(StepPlan(steps=ids))
        if is_cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    after = (group.num_collectives, group.num_sent_bytes) if group else (0, 0)
    engine.run(StepPlan(leaves=ids))
    return {"ms": times, "collectives": after[0] - before[0], "sent_bytes": after[1] - before[1]}


class Process:
    """One mode's rank 0, which starts and ends its followers."""

    def __init__(self, mode: str, arguments: list[str]) -> None:
        threads = {"OMP_NUM_THREADS": "1"}  # a rank on a CPU stands for a device: one core
        self.child = subprocess.Popen(
            [sys.executable, __file__, "--serve", mode, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads},
        )

    def answer(self) -> Any:
        assert self.child.stdout is not None
        if not (line := self.child.stdout.readline()):
            raise SystemExit(f"a process ended: {self.child.args}")
        return json.loads(line)

    def ask(self, order: str) -> Any:
        print(order, file=self.child.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        try:
            self.child.communicate(timeout=30)  # closes its standard input
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.communicate()


def measure(processes: dict[str, Process], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of samples and each mode."""
    rows = []
    for num_samples in arguments.samples:
        seen: dict[str, list[dict[str, Any]]] = {mode: [] for mode in processes}
        for _ in range(arguments.repeats):
            for mode, process in processes.items():
                seen[mode].append(process.ask(f"calls {num_samples} {arguments.calls}"))
        for mode, answers in seen.items():
            rows.append({"samples": num_samples, "mode": mode, **summary(answers, arguments, mode)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def summary(answers: list[dict[str, Any]], arguments: argparse.Namespace, mode: str) -> dict[str, Any]:
    times = [value for answer in answers for value in answer["ms"]]
    collectives, sent = (sum(answer[name] for answer in answers) / len(times) for name in ("collectives", "sent_bytes"))
    is_replayed = mode != "one rank" and collectives == 0  # captured in a CUDA graph, whose replays are not counted
    return {
        "ms_per_call": {
            "median": round(statistics.median(times), 2),
            "min": round(min(times), 2),
            "max": round(max(times), 2),
        },
        "collectives_per_call": None if is_replayed else collectives,
        "sent_bytes_per_call": None if is_replayed else sent,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--ranks", type=int, default=2, help="N, of rows and tensor")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="which are measured, in turn")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 2, 4, 8], help="guided samples in a call")
    parser.add_argument("--calls", type=int, default=8, help="in one turn of a process")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each process")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve, arguments)
    load_average = [round(load, 1) for load in os.getloadavg()]  # of what else the machine does
    processes: dict[str, Process] = {}
    skipped: dict[str, str] = {}
    about: dict[str, Any] = {}
    try:
        for mode in arguments.modes:
            processes[mode] = Process(mode, sys.argv[1:])
            first = processes[mode].answer()
            if "skipped" in first:
                skipped[mode] = first["skipped"]
                processes.pop(mode).end()
            else:
                about = first
        if not processes:
            raise SystemExit(f"no mode can run: {skipped}")
        rows = measure(processes, arguments)
        memory = {mode: [round(held / 2**20) for held in process.ask("memory")] for mode, process in processes.items()}
    finally:
        for process in processes.values():
            process.end()
    where = environment.circumstances(environment.PACKAGES)
    is_gpu = bool(about["device"])
    about["device"] = about["device"] or f"{where['device']}, one thread a rank"
    facts = {"model": arguments.model, **about, "num_ranks": arguments.ranks, "load_average": load_average}
    memory_is = "most that torch allocated" if is_gpu else "resident memory of the process"
    result = {**where, **facts, "rows": rows, "memory_mib_per_rank": memory, "memory_is": memory_is, "skipped": skipped}
    kind = ("gpu" if is_gpu else "cpu") + ("" if arguments.ranks == 2 else f"-{arguments.ranks}")
    out = arguments.out or RESULTS / f"ranks-{Path(arguments.model).name}-{kind}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()

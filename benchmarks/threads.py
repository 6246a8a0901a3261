#!/usr/bin/env python3
"""What the waiting of OpenMP's threads costs on a CPU: a turn of the native engine, alone and beside busy processes.

    python benchmarks/threads.py                            the built-in model, three minutes

Every setting has a process of its own, started with the setting in its environment, which makes turns of 8 guided samples when
it is told to and sleeps otherwise. They take turns, a few UNet calls each, so that a busy machine is busy for all of them; then
the same beside as many busy processes as there are cores. "ours" is what `mii_serve` sets where nothing is set.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mii_serve.bench import environment
from mii_serve.threads import WAIT_VARIABLES, wait_settings

RESULTS = Path(__file__).parent / "results"
NUM_SAMPLES = 8
SETTINGS: dict[str, dict[str, str]] = {
    "nothing set": {},
    **{f"GOMP_SPINCOUNT={count}": {"GOMP_SPINCOUNT": str(count)} for count in (30_000, 3000, 2000, 1000, 300)},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
    "OMP_PROC_BIND=true": {"OMP_PROC_BIND": "true"},
    "ours": wait_settings({}),
}
BUSY = "while True: pass"


def make_turns() -> None:
    """In a process of its own: for each line of stdin, that many turns, and their milliseconds on stdout."""
    import torch  # noqa: F401 - first, so that for "nothing set" nothing is set

    from mii_serve.config import DeployConfig
    from mii_serve.replica.local import build_warm_engine
    from mii_serve.types import RequestedParams, Sample, SampleId, StepPlan

    engine = build_warm_engine(DeployConfig.load({"model": "demo", "engine": "native", "device": "cpu"}))
    asked = RequestedParams(prompt="a red circle", num_inference_steps=1000, scheduler="euler", guidance_scale=7.5, seed=1)
    params = engine.capabilities.resolve(asked, fallback_seed=0)
    samples = tuple(Sample(id=SampleId("threads", index), params=params) for index in range(NUM_SAMPLES))
    ids = tuple(sample.id for sample in samples)
    engine.run(StepPlan(joins=samples, steps=ids))
    print("ready", flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            engine.run(StepPlan(steps=ids))
            times.append(1000 * (time.perf_counter() - start))
        print(json.dumps(times), flush=True)


class Process:
    """One setting's process."""

    def __init__(self, setting: dict[str, str]) -> None:
        bare = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES}
        command = [sys.executable, __file__, "--turns"]
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**bare, **setting}
        )

    def turns(self, count: int) -> list[float]:
        print(count, file=self._stdin, flush=True)
        return json.loads(self.line())

    def line(self) -> str:
        assert self.child.stdout is not None
        return self.child.stdout.readline()

    @property
    def _stdin(self) -> IO[str]:
        assert self.child.stdin is not None
        return self.child.stdin

    def end(self) -> None:
        self.child.kill()
        self.child.communicate()


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(processes: dict[str, Process], rounds: int, turns: int) -> dict[str, dict[str, float]]:
    """Milliseconds a turn of each, the processes taking turns."""
    seen: dict[str, list[float]] = {name: [] for name in processes}
    for _ in range(rounds):
        for name, process in processes.items():
            seen[name] += process.turns(turns)
    return {
        name: {"median_ms": round(statistics.median(times), 1), "min_ms": round(min(times), 1)} for name, times in seen.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--preload", metavar="LIBRARY", help="another OpenMP runtime to try, libiomp5.so or libomp.so")
    parser.add_argument("--out", type=Path, default=RESULTS / "threads.json")
    arguments = parser.parse_args()
    if arguments.turns:
        return make_turns()
    cores = len(os.sched_getaffinity(0))
    settings = dict(SETTINGS)
    if arguments.preload:
        settings |= {
            f"{Path(arguments.preload).name}, KMP_BLOCKTIME={ms}": {"LD_PRELOAD": arguments.preload, "KMP_BLOCKTIME": ms}
            for ms in ("0", "1", "200")
        }
    processes = {}
    try:
        for name, setting in settings.items():
            processes[name] = Process(setting)
            assert processes[name].line() == "ready\n"
        measure(processes, 1, 5)  # warms up
        alone = measure(processes, arguments.rounds, 8)
        with neighbours(cores):
            beside = measure(processes, max(1, arguments.rounds // 3), 3)
    finally:
        for process in processes.values():
            process.end()
    rows: list[dict[str, Any]] = [
        {"setting": name, "environment": setting, "alone": alone[name], "beside_busy_processes": beside[name]}
        for name, setting in settings.items()
    ]
    for row in rows:
        print(json.dumps(row), flush=True)
    about = environment.circumstances(environment.PACKAGES)
    told = {**about, "guided_samples": NUM_SAMPLES, "cores": cores, "busy_processes": cores, "rows": rows}
    arguments.out.write_text(json.dumps(told, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()

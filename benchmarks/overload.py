#!/usr/bin/env python3
"""Three times more than the server can do, for a minute: what is still done, how soon the rest is refused, and the memory.

    python benchmarks/overload.py                   two minutes

Capacity first: as many callers as keep every slot busy, each asking again as soon as it has its answer. Then an open loop:
requests come at random times at `--times` the rate of the capacity, whatever becomes of those before, each with a deadline. The
server is `mii_serve deploy` with the built-in model, in processes of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil

from mii_serve.bench import environment
from mii_serve.proto.codec import CHANNEL_OPTIONS
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationStub

RESULTS = Path(__file__).parent / "results"
STEPS = (10, 20, 30, 50)
CALLERS = 32
MIB = 1024 * 1024


@contextlib.contextmanager
def deployed(max_waiting_s: float) -> Iterator[tuple[psutil.Process, str]]:
    environment = {**os.environ, "MII_SERVE_MAX_WAITING_S": str(max_waiting_s)}
    command = [
        sys.executable,
        "-m",
        "mii_serve",
        "deploy",
        "demo",
        "--grpc-port",
        "0",
        "--http-port",
        "0",
        "--log-level",
        "error",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        ready = re.match(r"ready grpc=(\S+)", process.stdout.readline())
        assert ready
        try:
            yield psutil.Process(process.pid), ready[1]
        finally:
            process.terminate()


def memory_mib(front: psutil.Process) -> dict[str, float]:
    replicas = sum(child.memory_info().rss for child in front.children())
    return {"front": round(front.memory_info().rss / MIB, 1), "replica": round(replicas / MIB, 1)}


class CoresBusy:
    """How many cores the callers, the front and its replicas keep busy, from now on."""

    def __init__(self, front: psutil.Process) -> None:
        self._processes = {"callers": [psutil.Process()], "front": [front], "replicas": front.children()}
        self._start, self._before = time.perf_counter(), self._seconds()

    def _seconds(self) -> dict[str, float]:
        times = {name: [one.cpu_times() for one in some] for name, some in self._processes.items()}
        return {name: sum(one.user + one.system for one in some) for name, some in times.items()}

    def so_far(self) -> dict[str, float]:
        elapsed_s = time.perf_counter() - self._start
        return {name: round((now - self._before[name]) / elapsed_s, 3) for name, now in self._seconds().items()}


@dataclass
class Tally:
    """What became of the requests, by the code they ended with."""

    done_at: list[float] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    refused_ms: list[float] = field(default_factory=list)
    accepted_late: int = 0


async def ask(stub: Any, seed: int, timeout_s: float | None, tally: Tally) -> None:
    request = pb.GenerateRequest(prompt="a red circle", seed=seed, num_inference_steps=STEPS[seed % len(STEPS)])
    start, is_accepted = time.perf_counter(), False
    try:
        call = stub.GenerateStream(request, timeout=timeout_s)
        async for _ in call:
            is_accepted = True
        tally.done_at.append(time.perf_counter())
        tally.codes["OK"] += 1
    except grpc.aio.AioRpcError as error:
        tally.codes[error.code().name] += 1
        if is_accepted:
            tally.accepted_late += error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        else:
            tally.refused_ms.append(1e3 * (time.perf_counter() - start))


async def capacity(stub: Any, seconds: float) -> float:
    tally, end = Tally(), time.perf_counter() + seconds

    async def caller(number: int) -> None:
        seed = number
        while time.perf_counter() < end:
            await ask(stub, seed, None, tally)
            seed += CALLERS + 1  # a step count of its own each time

    start = time.perf_counter()
    await asyncio.gather(*(caller(number) for number in range(CALLERS)))
    return len(tally.done_at) / (time.perf_counter() - start)


async def overload(stub: Any, rate: float, seconds: float, timeout_s: float, front: psutil.Process) -> dict[str, Any]:
    chance, tally, memory, calls = random.Random(5), Tally(), [], []
    busy = CoresBusy(front)
    start = time.perf_counter()
    at, seed = 0.0, 0
    while at < seconds:
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        calls.append(asyncio.create_task(ask(stub, seed, timeout_s, tally)))
        if len(memory) <= 4 * at / seconds:
            memory.append(memory_mib(front))
        at, seed = at + chance.expovariate(rate), seed + 1
    memory.append(memory_mib(front))
    cores_busy = busy.so_far()
    await asyncio.gather(*calls)
    warm_s = min(5.0, seconds / 4)  # the first pictures need a moment
    counted = [done for done in tally.done_at if start + warm_s <= done <= start + seconds]
    return {
        "offered_per_s": round(rate, 1),
        "num_requests": len(calls),
        "goodput_per_s": round(len(counted) / (seconds - warm_s), 2),
        "codes": dict(tally.codes),
        "refusal_ms": {
            "median": round(statistics.median(tally.refused_ms), 1),
            "p95": round(statistics.quantiles(tally.refused_ms, n=20)[18], 1),
        },
        "accepted_but_late": tally.accepted_late,
        "cores_busy": cores_busy,
        "unaccounted": len(calls) - sum(tally.codes.values()),
        "memory_mib": memory,
    }


async def measure(target: str, front: psutil.Process, arguments: argparse.Namespace) -> dict[str, Any]:
    async with grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:
        stub = ImageGenerationStub(channel)
        await capacity(stub, 5.0)
        busy = CoresBusy(front)
        before = await capacity(stub, arguments.seconds / 2)
        busy_at_capacity = busy.so_far()
        row = await overload(stub, before * arguments.times, arguments.seconds, arguments.timeout, front)
        after = await capacity(stub, arguments.seconds / 2)
        able = (before + after) / 2
    share = round(row["goodput_per_s"] / able, 3)
    row["cores_busy"] = {"at_capacity": busy_at_capacity, "overloaded": row.pop("cores_busy")}
    return {"capacity_per_s": {"before": round(before, 2), "after": round(after, 2)}, "goodput_of_capacity": share, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--times", type=float, default=3.0)
    parser.add_argument("--timeout", type=float, default=20.0, help="each request's deadline, in seconds")
    parser.add_argument("--max-waiting-s", type=float, default=10.0, help="the server's bound on its line")
    parser.add_argument("--out", type=Path, default=RESULTS / "overload-demo.json")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left
    with deployed(arguments.max_waiting_s) as (front, target):
        row = asyncio.run(measure(target, front, arguments))
    print(json.dumps(row))
    about = environment.circumstances()
    settings = {name: getattr(arguments, name) for name in ("seconds", "times", "timeout", "max_waiting_s")}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**about, "cores": os.cpu_count(), **settings, **row}, indent=1) + "\n")


if __name__ == "__main__":
    main()

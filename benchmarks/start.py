#!/usr/bin/env python3
"""Where a cold start goes, and how long the place of a lost replica is empty.

    python benchmarks/start.py                      the built-in model, two minutes on two CPU cores
    python benchmarks/start.py --model ./my-model   any model that `mii_serve deploy` takes

The phases are those of one process that does what a replica does: Python's own start, the imports, the load, the warm-up.
The rest is seen from outside: a deployment from its command to its first address and its ready line, and the time from a
SIGKILL of its replica until a request is answered again, with a spare process and without. Everything is repeated by turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil

from mii_serve.bench import environment
from mii_serve.client import Client

RESULTS = Path(__file__).parent / "results"
ASKED = {"prompt": "a red circle", "num_inference_steps": 1, "seed": 1}
POLL_S = 0.02


def make_phases(model: str, born: float) -> None:
    """In a process of its own: what a replica does until it is ready, on the clock that all processes share."""
    running = time.monotonic()
    from mii_serve.models.deferred import import_for_drawing
    from mii_serve.replica.process import HEAVY_MODULES
    from mii_serve.threads import wait_briefly

    wait_briefly()
    import_for_drawing(*HEAVY_MODULES)
    imported = time.monotonic()
    from mii_serve.config import DeployConfig
    from mii_serve.engine.factory import build_engine

    engine = build_engine(DeployConfig.load({"model": model}))
    loaded = time.monotonic()
    engine.warmup()
    warm = time.monotonic()
    phases = {"process": running - born, "imports": imported - running, "load": loaded - imported, "warm_up": warm - loaded}
    print(json.dumps(phases))


def phases_of(model: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--model", model, "--phases", str(time.monotonic())]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def deployment_of(model: str, has_spare: bool) -> dict[str, float]:
    """Seconds of a start and of a restart."""
    command = [sys.executable, "-m", "mii_serve", "deploy", model, "--grpc-port", "0", "--http-port", "0"]
    variables = {**os.environ, "MII_SERVE_ENABLE_SPARE_PROCESS": str(has_spare)}
    start = time.monotonic()
    with started(command, variables) as process:
        assert process.stdout is not None and process.stderr is not None
        times: dict[str, float] = {}
        for _ in _lines(process.stderr, "listening on "):
            times["until_listening"] = time.monotonic() - start
            break
        ready = process.stdout.readline()
        times["until_ready"] = time.monotonic() - start
        match = re.match(r"ready grpc=(\S+)", ready)
        if match is None:
            raise SystemExit(f"{' '.join(command)}: not ready: {ready!r}")
        with Client(match[1]) as client:
            client.generate(**ASKED)
            replica = _settled(process.pid, has_spare)
            killed = time.monotonic()
            os.kill(replica.pid, signal.SIGKILL)
            client.generate(**ASKED)  # waits for a replica
            times["from_kill_to_picture"] = time.monotonic() - killed
        return times


@contextlib.contextmanager
def started(command: list[str], variables: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _lines(stream: IO[str], beginning: str) -> Iterator[str]:
    for line in stream:
        if line.startswith(beginning):
            yield line


def _settled(pid: int, has_spare: bool) -> psutil.Process:
    """The replica, once the spare, if there is to be one, has done its imports: it uses no more time."""
    while True:
        children = {_is_spare(child): child for child in psutil.Process(pid).children()}
        if False in children and (not has_spare or (True in children and _is_idle(children[True]))):
            return children[False]
        time.sleep(POLL_S)


def _is_spare(process: psutil.Process) -> bool:
    return process.cmdline()[-1:] == ["spare"] and process.name() != "mii_replica"


def _is_idle(process: psutil.Process) -> bool:
    before = process.cpu_times()
    time.sleep(1.0)
    return before.user > 1.0 and process.cpu_times().user - before.user < 0.05


def spare_memory(model: str) -> dict[str, float]:
    """MiB of the machine's memory: what only the spare has, and its share of what it has with others."""
    command = [sys.executable, "-m", "mii_serve", "deploy", model, "--grpc-port", "0", "--http-port", "0"]
    with started(command, dict(os.environ)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        _settled(process.pid, has_spare=True)
        [spare] = [child for child in psutil.Process(process.pid).children() if _is_spare(child)]
        memory = spare.memory_full_info()
        return {"unique_mib": round(memory.uss / 2**20), "proportional_mib": round(memory.pss / 2**20)}


def summary(seen: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "median_s": round(statistics.median(one[name] for one in seen), 2),
            "min_s": round(min(one[name] for one in seen), 2),
            "max_s": round(max(one[name] for one in seen), 2),
        }
        for name in seen[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--phases", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.phases is not None:
        return make_phases(arguments.model, arguments.phases)
    phases, with_spare, without = [], [], []
    for _ in range(arguments.repeats):
        phases.append(phases_of(arguments.model))
        with_spare.append(deployment_of(arguments.model, has_spare=True))
        without.append(deployment_of(arguments.model, has_spare=False))
        print(json.dumps({"phases": phases[-1], "with_spare": with_spare[-1], "without": without[-1]}), flush=True)
    times: dict[str, Any] = {
        **environment.circumstances(environment.PACKAGES),
        "model": arguments.model,
        "repeats": arguments.repeats,
        "phases_of_a_replica": summary(phases),
        "with_a_spare": summary(with_spare),
        "without_a_spare": summary(without),
        "memory_of_a_spare": spare_memory(arguments.model),
    }
    name = "".join(c if c.isalnum() else "-" for c in Path(arguments.model).name)
    out = arguments.out or RESULTS / f"start-{name}.json"
    out.write_text(json.dumps(times, indent=1) + "\n")
    print(f"written to {out}")
    return None


if __name__ == "__main__":
    main()

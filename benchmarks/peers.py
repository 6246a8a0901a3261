#!/usr/bin/env python3
"""Servers of the same model on this machine, in turn under the same load, their pictures checked.

    make peers              installs the peers into .peers, then runs this; under ten minutes
    python benchmarks/peers.py --systems mii_serve mii_legacy --seconds 5

All servers run from the start, and those that are not measured idle, so that what is compared is measured within the same
minute. First what each can do: a closed loop of 16 callers, in two rounds. Then an open loop, Poisson arrivals at 0.5, 0.85 and
1.2 of what the first system named can do, the same arrivals and requests for everybody, each with a deadline. `uniform` asks
for 20 steps, `mixed` for 10, 20, 30 or 50, a quarter each. A load that a server has failed at a lower rate (fewer than half
answered in time) is left out and named. What the peers are is in `benchmarks/peers/`; the requests' sampler is PNDM, which is
the pipeline's own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mii_serve.bench import environment
from mii_serve.bench.check import SampledPicture, Tolerance, check, open_reference
from mii_serve.bench.grpc_driver import GrpcDriver
from mii_serve.bench.http_client import http_address
from mii_serve.bench.http_driver import HttpDriver
from mii_serve.bench.load import Driver, LoadLimits
from mii_serve.bench.mii_driver import MiiDriver
from mii_serve.bench.mix import parse_mix
from mii_serve.bench.run import Loop, Plan, measure
from mii_serve.bench.spread import spread
from mii_serve.bench.summary import summary
from mii_serve.bench.values import Record

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEMO = ROOT / "mii_serve" / "models" / "demo"
PEER_PYTHON = ROOT / ".peers" / "bin" / "python"
LOADS = (0.5, 0.85, 1.2)
COMMON = "guidance_scale=3, height=64, width=64, scheduler=pndm"
MIXES = {
    "uniform": f"1: num_inference_steps=20, {COMMON}",
    "mixed": "; ".join(f"1: num_inference_steps={steps}, {COMMON}" for steps in (10, 20, 30, 50)),
}
CALLERS = 16
NUM_CAPACITY_ROUNDS = 2
START_TIMEOUT_S = 120.0
DRAIN_TIMEOUT_S = 6.0
CAPACITY_TIMEOUT_S = 30.0
PACKAGES = ("torch", "diffusers", "transformers", "grpcio", "deepspeed", "deepspeed-mii", "fastapi", "litserve", "ray")


@dataclass(frozen=True)
class System:
    """How a server is started (FOLDER and PORT are filled in), and which wire it speaks."""

    name: str
    wire: str
    command: tuple[str, ...]
    note: str

    def driver(self, port: int) -> Driver:
        match self.wire:
            case "grpc":
                return GrpcDriver(f"127.0.0.1:{port}")
            case "mii":
                return MiiDriver(f"127.0.0.1:{port}")
            case _:
                return HttpDriver(http_address(f"127.0.0.1:{port}"))


def _peer(script: str, *arguments: str) -> tuple[str, ...]:
    return (str(PEER_PYTHON), str(ROOT / "benchmarks" / "peers" / script), "FOLDER", "PORT", *arguments)


OURS = (sys.executable, "-m", "mii_serve", "deploy", "demo", "--grpc-port", "PORT", "--http-port", "0", "--log-level", "error")
SYSTEMS = {
    system.name: system
    for system in (
        System("mii_serve", "grpc", OURS, "this server, its own gRPC"),
        System("mii_legacy", "mii", _peer("mii_legacy.py"), "deepspeed-mii's serve_inference, its own gRPC"),
        System("fastapi", "http", _peer("fastapi_server.py"), "diffusers behind FastAPI, a lock around the pipeline"),
        System("litserve", "http", _peer("litserve_server.py"), "LitServe, batches of up to 8 that come within 50 ms"),
        System("ray_serve", "http", _peer("ray_server.py"), "Ray Serve, @serve.batch of up to 8 within 50 ms"),
        System("fastapi_unlocked", "http", _peer("fastapi_server.py", "unlocked"), "the same FastAPI server without the lock"),
    )
}


class DownError(Exception):
    """A server did not start, or does not answer any more."""


class Server:
    """A system's processes, a session of their own, so that all of them can be ended."""

    def __init__(self, system: System) -> None:
        self.system, self.port = system, _free_port()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `stop` closes it
        command = [{"FOLDER": str(DEMO), "PORT": str(self.port)}.get(part, part) for part in system.command]
        environment = {**os.environ, "PYTHONPATH": str(ROOT) if system.command is OURS else "", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, env=environment, start_new_session=True, cwd=ROOT
        )

    async def ready(self, driver: Driver, plan: Plan, timeout_s: float) -> None:
        """Wait until it has answered a request.

        Raises:
            DownError: it has not in time, or has ended.
        """
        request = plan.mix.request("ready", 0)
        deadline = time.monotonic() + timeout_s
        said = ""
        while (left_s := deadline - time.monotonic()) > 0:
            if self._process.poll() is not None:
                raise DownError(f"it ended with {self._process.returncode}: {self.log()}")
            answer = await driver.ask(request, left_s)
            if answer.code == "OK":
                return
            said = f"{answer.code} {answer.text}"
            await asyncio.sleep(0.25)
        raise DownError(f"no answer within {timeout_s:g} s: {said[:200]} {self.log()}")

    def log(self) -> str:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 1500))
        return " ".join(self._log.read().split())[-600:]

    def stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
                if number == signal.SIGTERM:
                    time.sleep(0.5)  # its children end after it
        self._log.close()


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@dataclass
class Peer:
    """A system and its server, which is replaced by a fresh one where it goes on with the load before."""

    system: System
    server: Server
    failed: dict[str, str] = field(default_factory=dict)
    """By mix, why its other loads are left out."""


@dataclass
class Run:
    """The whole measurement, and what it has found so far."""

    arguments: argparse.Namespace
    deadline: float
    rows: list[dict[str, Any]]
    kept: list[tuple[int, list[SampledPicture]]]
    capacity: dict[str, float]

    async def all(self, systems: Sequence[System]) -> None:
        peers: list[Peer] = []
        try:
            for system in systems:
                if os.access(system.command[0], os.X_OK):
                    peers.append(Peer(system, Server(system)))
                else:
                    self._skip({"system": system.name}, f"{system.command[0]} is missing: make peers installs it")
            for peer in peers:  # all of them first: a start would slow whichever is measured meanwhile
                await self._started(peer, self.arguments.mixes)
            for mix in self.arguments.mixes:
                for load in (*(["capacity"] * NUM_CAPACITY_ROUNDS), *LOADS):
                    for peer in peers:
                        await self._in_turn(peer, mix, load)
        finally:
            for peer in peers:
                peer.server.stop()

    async def _started(self, peer: Peer, mixes: Sequence[str]) -> None:
        try:
            await self._drained(peer, self._plan(mixes[0], Loop(kind="closed", callers=CALLERS), num_warmup=0), START_TIMEOUT_S)
        except DownError as reason:
            peer.failed.update(dict.fromkeys(mixes, str(reason)))

    @property
    def _left_s(self) -> float:
        return self.deadline - time.monotonic()

    async def _in_turn(self, peer: Peer, mix: str, load: float | str) -> None:
        about = {"system": peer.system.name, "mix": mix, "load": load}
        if load != "capacity" and "unlocked" in peer.system.name:
            return  # it is here for its pictures, not for its times
        if mix in peer.failed:
            self._skip(about, peer.failed[mix])
        elif self._left_s < self.arguments.seconds + self.arguments.timeout:
            self._skip(about, "no time left")
        else:
            try:
                await self._measure(peer, mix, load)
            except DownError as reason:
                peer.failed[mix] = str(reason)
                self._skip(about, str(reason))

    async def _measure(self, peer: Peer, mix: str, load: float | str) -> None:
        if load == "capacity":
            plan = self._plan(mix, Loop(kind="closed", callers=CALLERS), num_warmup=CALLERS // 2)
        else:
            plan = self._plan(mix, Loop(kind="poisson", rate=float(load) * self._capacity(mix)), num_warmup=0)
        await self._drained(peer, plan, START_TIMEOUT_S if load == "capacity" else DRAIN_TIMEOUT_S)
        figures = await self._measured(peer.system, peer.server, mix, load, plan)
        if load != "capacity" and figures["num_ok"] < figures["num_requests"] / 2:
            peer.failed[mix] = f"it failed more than half of the requests at {load:g}"

    def _capacity(self, mix: str) -> float:
        """Of the first system that was measured, in requests a second."""
        of_mix = [row for row in self.rows if row["mix"] == mix and row.get("load") == "capacity" and "skipped" not in row]
        rates = [row["requests_per_s"] for row in of_mix if row["system"] == of_mix[0]["system"]]
        return self.capacity.setdefault(mix, statistics.mean(rates) if any(rates) else 1.0)

    async def _measured(self, system: System, server: Server, mix: str, load: float | str, plan: Plan) -> dict[str, Any]:
        driver = system.driver(server.port)
        try:
            measured = await measure(plan, driver)
        finally:
            await driver.close()
        target_s = self.arguments.goodput
        figures = summary(measured.records, target_s=target_s)
        counted = measured.records
        if load == "capacity":
            figures["requests_per_s"], counted = steady(measured.records, self.arguments.seconds)
        row = {
            "system": system.name,
            "mix": mix,
            "load": load,
            "rate": plan.loop.rate,
            **{name: figures[name] for name in ("num_requests", "num_ok", "seconds", "requests_per_s", "codes", "lag")},
            "goodput": figures["goodput"],
            "total_s": figures["latency_s"]["total"],
            "total_p95_s_by_kind": {kind: one["total"] and one["total"]["p95"] for kind, one in figures["by_kind"].items()},
            "intervals": spread(counted, target_s=target_s).intervals(),
            "observed": measured.observed,
            "examples": measured.examples,
        }
        self.kept.append((len(self.rows), measured.sampled))
        self.rows.append(_rounded(row))
        latency = figures["latency_s"]["total"] or {}
        print(
            f"{system.name:18}{mix:9}{load!s:9}{figures['num_ok']:4} of {figures['num_requests']:4}  "
            f"{figures['requests_per_s'] or 0:6.2f}/s  p50 {latency.get('p50', float('nan')):6.2f}  "
            f"p95 {latency.get('p95', float('nan')):6.2f} s",
            flush=True,
        )
        return figures

    async def _drained(self, peer: Peer, plan: Plan, timeout_s: float) -> None:
        """Wait until nothing of the load before is left; a server that goes on with it is replaced by a fresh one."""
        for is_last in (False, True):
            driver = peer.system.driver(peer.server.port)
            try:
                bound_s = START_TIMEOUT_S if is_last else timeout_s
                await peer.server.ready(driver, plan, max(5.0, min(bound_s, self._left_s)))
                return
            except DownError:
                if is_last or timeout_s == START_TIMEOUT_S:
                    raise
            finally:
                await driver.close()
            peer.server.stop()
            peer.server = Server(peer.system)

    def _plan(self, mix: str, loop: Loop, num_warmup: int) -> Plan:
        # What a server can do is not a matter of deadlines.
        timeout_s = CAPACITY_TIMEOUT_S if loop.kind == "closed" else self.arguments.timeout
        limits = LoadLimits(duration_s=self.arguments.seconds, timeout_s=timeout_s, max_in_flight=256)
        size = len(MIXES[mix].split(";"))
        return Plan(loop=loop, mix=parse_mix(MIXES[mix]), limits=limits, seed="peers", num_warmup=num_warmup, sample_size=size)

    def _skip(self, about: dict[str, Any], reason: str) -> None:
        self.rows.append({**about, "skipped": reason})
        print({**about, "skipped": reason}, flush=True)

    def check(self) -> None:
        """Every row gets the verdict on its own pictures."""
        if not self.kept:
            return
        with open_reference("demo") as reference:
            for index, kept in self.kept:
                verdict = check(kept, reference, Tolerance())
                wrong = [one for one in verdict.pictures if not one.is_ok]
                levels = [one.max_levels for one in verdict.pictures if one.max_levels is not None]
                self.rows[index]["check"] = {
                    "is_ok": verdict.is_ok,
                    "num_checked": len(verdict.pictures),
                    "num_wrong": len(wrong),
                    "max_levels_off": max(levels, default=None),
                }


def steady(records: list[Record], seconds: float) -> tuple[float, list[Record]]:
    """Requests a second while all callers are busy, and those that count: not the start, when none can end, nor the end."""
    from_s = seconds / 4
    inside = [
        replace(record, intended_s=record.intended_s - from_s, ended_s=record.ended_s - from_s)
        for record in records
        if record.is_ok and from_s < record.ended_s <= seconds
    ]
    if not inside:  # slower than the run is long: all that there is
        well = [record for record in records if record.is_ok]
        return len(well) / max((record.ended_s for record in records), default=seconds), well
    return len(inside) / (seconds - from_s), inside


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


def peer_versions() -> dict[str, str]:
    """Of the peers' environment; empty where there is none."""
    if not PEER_PYTHON.exists():
        return {}
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {PACKAGES}}}))"
    ran = subprocess.run([str(PEER_PYTHON), "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return json.loads(ran.stdout) if ran.returncode == 0 else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), help="the first one's capacity is 1"
    )
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), choices=list(MIXES))
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument("--timeout", type=float, default=5.0, help="each request's deadline, in seconds")
    parser.add_argument("--goodput", type=float, default=2.0, metavar="SECONDS", help="what counts as in time")
    parser.add_argument(
        "--budget", type=float, default=510.0, metavar="SECONDS", help="loads that do not fit are left out and named"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "peers-demo.json")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left
    start = time.monotonic()
    run = Run(arguments, start + arguments.budget, [], [], {})
    asyncio.run(run.all([SYSTEMS[name] for name in arguments.systems]))
    run.check()
    about = {
        **environment.circumstances(),
        "peer_versions": peer_versions(),
        "systems": {name: {"wire": SYSTEMS[name].wire, "note": SYSTEMS[name].note} for name in arguments.systems},
        "mixes": {name: parse_mix(MIXES[name]).describe() for name in arguments.mixes},
        "callers": CALLERS,
        **{name: getattr(arguments, name) for name in ("seconds", "timeout", "goodput")},
        "capacity_per_s": {name: round(value, 3) for name, value in run.capacity.items()},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**about, "rows": run.rows}, indent=1) + "\n")
    print(f"written to {arguments.out}, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

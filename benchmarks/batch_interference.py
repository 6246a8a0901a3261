#!/usr/bin/env python3
"""What a flood of batch requests does to the others on a real server, and what a batch gets when there are no others.

    python benchmarks/batch_interference.py         some 20 minutes on an idle machine

A server of its own with the built-in model. First two floods in turn, of the priorities batch and normal, each with twice as
many requests as there are slots and nothing beside it: their images per second, from the end of the first slots' images to
the end of the last. Then, in turn, requests of the priority normal that arrive at random times (Poisson), alone and beside
the flood of batch requests. Both have the same arrivals, prompts and seeds; the order within a pair changes from round to
round. Latency counts from the moment a request was meant to be sent; arrivals of the first seconds are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from mii_serve.bench import environment
from mii_serve.bench.statistics import percentile
from mii_serve.cli.own_server import own_server
from mii_serve.client import AsyncClient

RESULTS = Path(__file__).parent / "results"
WARM_UP_S = 5.0
"""Of each run: the flood fills the slots, and what arrives is not measured."""
PROMPT = "a red circle on a blue background"


class Flood:
    """So many requests at once, for as long as it runs."""

    def __init__(self, client: AsyncClient, priority: str, num_at_once: int, num_steps: int) -> None:
        self._client, self._priority = client, priority
        self._num_at_once, self._num_steps = num_at_once, num_steps
        self.ended_at: list[float] = []
        self._has_ended = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        senders = [asyncio.create_task(self._send(number)) for number in range(self._num_at_once)]
        try:
            yield
        finally:
            for sender in senders:
                sender.cancel()
            for outcome in await asyncio.gather(*senders, return_exceptions=True):
                assert isinstance(outcome, asyncio.CancelledError), outcome

    async def _send(self, number: int) -> None:
        while True:
            await self._client.generate(PROMPT, num_inference_steps=self._num_steps, seed=number, priority=self._priority)
            self.ended_at.append(time.monotonic())
            self._has_ended.set()

    async def until(self, count: int) -> None:
        while len(self.ended_at) < count:
            self._has_ended.clear()
            await self._has_ended.wait()

    def per_s(self, begun: float, seconds: float) -> float:
        return sum(begun + WARM_UP_S < at <= begun + seconds for at in self.ended_at) / (seconds - WARM_UP_S)


async def flood_alone(flood: Flood, num_slots: int, num_images: int) -> float:
    """Images per second. Images of one turn end together, so both ends of the time are ends of images."""
    async with flood.running():
        await flood.until(num_slots + num_images)
        ended = sorted(flood.ended_at)
    return (len(ended) - num_slots) / (ended[-1] - ended[num_slots - 1])


async def arrivals(client: AsyncClient, rate: float, seconds: float, seed: int, num_steps: int) -> list[float]:
    """The latencies of the requests that arrived after the warm-up."""
    source, begun, at = random.Random(seed), time.monotonic(), 0.0
    asked: list[asyncio.Task[float | None]] = []

    async def ask(due: float, number: int) -> float | None:
        await client.generate(PROMPT, num_inference_steps=num_steps, seed=1000 + number)
        return time.monotonic() - due if due - begun > WARM_UP_S else None

    while (at := at + source.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, begun + at - time.monotonic()))
        asked.append(asyncio.create_task(ask(begun + at, len(asked))))
    return [latency for latency in await asyncio.gather(*asked) if latency is not None]


async def measure(target: str, arguments: argparse.Namespace) -> dict[str, Any]:
    async with AsyncClient(target) as client:
        info = await client.server_info()
        num_at_once, steps = 2 * info.activity.max_slots, arguments.steps

        def flood(priority: str) -> Flood:
            return Flood(client, priority, num_at_once, steps)

        alone: dict[str, list[float]] = {"batch": [], "normal": []}
        for round_number in range(arguments.rounds):
            for priority in ("batch", "normal") if round_number % 2 else ("normal", "batch"):
                found_per_s = await flood_alone(flood(priority), info.activity.max_slots, arguments.flood_images)
                alone[priority].append(found_per_s)
                print(f"flood of {priority} alone: {found_per_s:.2f} images/s", flush=True)
        capacity = sum(alone["normal"]) / arguments.rounds
        rate = arguments.load * capacity
        latencies: dict[str, list[list[float]]] = {"without": [], "with": []}
        beside: list[float] = []
        for round_number in range(arguments.rounds):
            for way in ("with", "without") if round_number % 2 else ("without", "with"):
                batch, begun = flood("batch"), time.monotonic()
                async with contextlib.AsyncExitStack() as stack:
                    if way == "with":
                        await stack.enter_async_context(batch.running())
                    found = await arrivals(client, rate, arguments.seconds, round_number, steps)
                    if way == "with":
                        beside.append(batch.per_s(begun, arguments.seconds))
                latencies[way].append(found)
                print(f"{way} the flood: p50 {percentile(found, 50):.2f} s, p95 {percentile(found, 95):.2f} s", flush=True)
    return {
        "max_slots": info.activity.max_slots,
        "num_at_once": num_at_once,
        "num_inference_steps": steps,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "load": arguments.load,
        "rate_per_s": round(rate, 3),
        "flood_alone_per_s": {name: [round(one, 3) for one in values] for name, values in alone.items()},
        "batch_share_of_normal": round(sum(alone["batch"]) / sum(alone["normal"]), 3),
        "batch_beside_others_per_s": [round(one, 3) for one in beside],
        "latency_s": {way: _summary(rounds) for way, rounds in latencies.items()},
        "p95_ratio": round(_p95(latencies["with"]) / _p95(latencies["without"]), 3),
    }


def _summary(rounds: list[list[float]]) -> dict[str, Any]:
    every = [latency for one in rounds for latency in one]
    return {
        "count": len(every),
        "p50": round(percentile(every, 50), 3),
        "p95": round(percentile(every, 95), 3),
        "p95_by_round": [round(percentile(one, 95), 3) for one in rounds],
    }


def _p95(rounds: list[list[float]]) -> float:
    return percentile([latency for one in rounds for latency in one], 95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=120.0, help="of arrivals, in each run")
    parser.add_argument("--flood-images", type=int, default=48, help="of a flood alone, in each run")
    parser.add_argument("--load", type=float, default=0.3, help="of the arrivals, as a part of what the server can make")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--max-slots", type=int, default=8)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--out", type=Path, default=RESULTS / "batch-interference.json")
    arguments = parser.parse_args()
    with own_server([arguments.model, "--max-slots", str(arguments.max_slots)]) as target:
        measured = asyncio.run(measure(target, arguments))
    print(json.dumps(measured, indent=1))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**environment.circumstances(), **measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()

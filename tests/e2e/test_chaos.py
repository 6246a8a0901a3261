"""Replicas killed at random under load: every request still ends in its own right picture, once."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import psutil
import pytest
from deployments import WITH_SPARE, Deployment, deployed, ready_replicas, until
from patience import PATIENCE_S
from PIL import Image

from mii_serve.client import Client, GenerationResult

NUM_REQUESTS = 40
NUM_KILLS = 4
NUM_CALLERS = 12
IMAGE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
MASK = Image.linear_gradient("L").resize((64, 64)).rotate(90)
TOLERANCE = 1
"""In 1/255: what the rest of a batch may change in FP32."""


def mixed_requests() -> list[dict]:
    chance = random.Random(11)
    return [
        {
            "prompt": f"a {chance.choice(['red', 'green', 'blue'])} {chance.choice(['circle', 'square', 'ring'])}",
            "seed": seed * 10,
            "num_inference_steps": chance.choice([6, 10, 20, 30]),
            "scheduler": chance.choice(["euler", "pndm", "ddim", "dpm++_2m", "euler_a"]),
            "guidance_scale": chance.choice([0.0, 4.0, 7.5]),
            "num_images_per_prompt": chance.choice([1, 1, 1, 3]),
            **([{}, {"image": IMAGE, "strength": 0.6}, {"image": IMAGE, "mask_image": MASK}][seed % 3]),
        }
        for seed in range(NUM_REQUESTS)
    ]


class Storm:
    """Requests without end, and a kill each time that a replica is ready and a picture has come since the last kill."""

    def __init__(self, running: Deployment, client: Client, requests: list[dict]) -> None:
        self._running, self._client, self._requests = running, client, requests
        self._chance = random.Random(12)
        self._is_over = threading.Event()
        self.killed: list[int] = []
        self._calling: list[Future[None]] = []
        self.made: list[tuple[int, GenerationResult]] = []
        """Which request, and what came of it."""

    def rage(self, callers: ThreadPoolExecutor, num_callers: int) -> None:
        """Until as many are killed as shall be, and each request has been made at least once."""
        self._calling = calling = [callers.submit(self._call, caller, num_callers) for caller in range(num_callers)]
        try:
            while len(self.killed) < NUM_KILLS and not self._is_broken():
                self._kill_one()
        finally:
            self._is_over.set()
            for call in calling:
                call.result()

    def _call(self, caller: int, num_callers: int) -> None:
        own = range(caller, len(self._requests), num_callers)
        for count, index in enumerate(itertools.cycle(own)):
            if count >= len(own) and self._is_over.is_set():
                return
            self.made.append((index, self._client.generate(**self._requests[index], timeout=PATIENCE_S)))

    def _is_broken(self) -> bool:
        return any(call.done() for call in self._calling)

    def _kill_one(self) -> None:
        num_made = len(self.made)
        until(lambda: len(self.made) > num_made or self._is_broken(), "another picture has come")
        until(lambda: ready_replicas(self._client) or self._is_broken(), "a replica is ready")
        victim = self._chance.choice(self._running.replica_pids())
        self.killed.append(victim)
        os.kill(victim, signal.SIGKILL)


def difference(one: GenerationResult, other: GenerationResult) -> int:
    """The largest difference of any byte of any image."""
    pairs = zip(one.images, other.images, strict=True)
    return max(abs(a - b) for left, right in pairs for a, b in zip(left.tobytes(), right.tobytes(), strict=True))


@pytest.mark.slow
def test_every_request_outlives_random_kills():
    requests = mixed_requests()
    with deployed("demo", "--replicas", "3", env=WITH_SPARE) as running, Client(running.grpc) as client:
        with ThreadPoolExecutor(NUM_CALLERS) as callers:
            calm = list(callers.map(lambda request: client.generate(**request, timeout=PATIENCE_S), requests))
            storm = Storm(running, client, requests)
            storm.rage(callers, NUM_CALLERS)
        assert len(storm.killed) == NUM_KILLS
        assert {index for index, _ in storm.made} == set(range(NUM_REQUESTS))
        for index, result in storm.made:
            assert result.seeds == calm[index].seeds
            assert difference(result, calm[index]) <= TOLERANCE
        until(lambda: len(ready_replicas(client)) == 3, "all are back")
        activity = client.server_info().activity
        assert activity.num_running + activity.num_waiting == 0
        replicas = running.replica_pids()
        assert len(replicas) == 3
        running.process.kill()
        until(lambda: not any(psutil.pid_exists(pid) for pid in replicas), "no orphan is left")

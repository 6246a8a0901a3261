"""Replicas killed at random under load: every request still ends in its own right picture, once."""

from __future__ import annotations

import os
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from deployments import Deployment, deployed, until

from mii_serve.client import Client
from mii_serve.client.values import GenerationResult

NUM_REQUESTS = 200
KILL_EVERY_S = 4.0
TIMEOUT_S = 200.0
"""For one request. A test whose calls have no bound ends when the whole suite is stopped, and says nothing."""
TOLERANCE = 1
"""In 1/255: what another company in the batch may change in FP32."""


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
        }
        for seed in range(NUM_REQUESTS)
    ]


def kill_at_random(running: Deployment, is_over: threading.Event, killed: list[int]) -> None:
    chance = random.Random(12)
    while not is_over.wait(KILL_EVERY_S):
        if replicas := running.replica_pids():
            victim = chance.choice(replicas)
            killed.append(victim)
            os.kill(victim, signal.SIGKILL)


def difference(one: GenerationResult, other: GenerationResult) -> int:
    """The largest difference of any byte of any image."""
    pairs = zip(one.images, other.images, strict=True)
    return max(abs(a - b) for left, right in pairs for a, b in zip(left.tobytes(), right.tobytes(), strict=True))


@pytest.mark.slow
def test_two_hundred_requests_outlive_random_kills():
    requests = mixed_requests()
    with deployed("demo", "--replicas", "3") as running, Client(running.grpc) as client:
        with ThreadPoolExecutor(12) as callers:
            calm = list(callers.map(lambda request: client.generate(**request, timeout=TIMEOUT_S), requests))
            is_over, killed = threading.Event(), []
            killer = threading.Thread(target=kill_at_random, args=(running, is_over, killed))
            killer.start()
            try:
                stormy = list(callers.map(lambda request: client.generate(**request, timeout=TIMEOUT_S), requests))
            finally:
                is_over.set()
                killer.join()
        assert len(killed) >= 3, "nothing was tested"
        assert [result.seeds for result in stormy] == [result.seeds for result in calm]
        assert max(difference(one, other) for one, other in zip(calm, stormy, strict=True)) <= TOLERANCE
        until(lambda: all(replica.is_ready for replica in client.server_info().replicas), "all are back")
        activity = client.server_info().activity
        assert activity.num_running + activity.num_waiting == 0
        replicas = running.replica_pids()
        assert len(replicas) == 3
        running.process.kill()
        until(lambda: not any(psutil.pid_exists(pid) for pid in replicas), "no orphan is left", 5)

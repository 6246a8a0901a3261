"""A replica of two ranks that loses one: the group ends as one, the requests are made again, nothing is left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from deployments import Deployment, deployed, until
from patience import PATIENCE_S

from mii_serve.client import Client, GenerationResult

HANG_TIMEOUT_S = "10"
"""No turn of this small model takes so long, whatever else the machine does."""
NUM_CALLERS = 3

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def running() -> Iterator[Deployment]:
    arguments = ("demo", "--tensor-parallel", "2", "--parallelism", "rows", "--engine", "native", "--device", "cpu")
    with deployed(*arguments, "--disable-safety-checker", env={"MII_SERVE_HANG_TIMEOUT_S": HANG_TIMEOUT_S}) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def calm(running: Deployment) -> list[GenerationResult]:
    """What the requests give while nothing is lost."""
    with Client(running.grpc) as client:
        return [draw(client, seed) for seed in range(NUM_CALLERS)]


def ranks(running: Deployment) -> list[psutil.Process]:
    """Rank 0 and its followers."""
    [replica] = running.replica_pids()
    return [psutil.Process(replica), *psutil.Process(replica).children()]


def draw(client: Client, seed: int) -> GenerationResult:
    guidance = 7.5 if seed % 2 else 0.0
    return client.generate(
        prompt="a red circle", seed=seed, num_inference_steps=20, guidance_scale=guidance, timeout=PATIENCE_S
    )


@pytest.mark.parametrize(("rank", "number"), [(1, signal.SIGKILL), (1, signal.SIGSTOP)], ids=["killed", "stopped"])
def test_a_lost_rank_ends_its_group_and_no_request(running, calm, rank, number):
    with Client(running.grpc) as client, ThreadPoolExecutor(NUM_CALLERS) as callers:
        group = ranks(running)
        info = client.server_info()
        assert (len(group), info.num_ranks, info.parallelism) == (2, 2, "rows")
        num_steps = info.activity.num_steps
        calls = [callers.submit(draw, client, seed) for seed in range(NUM_CALLERS)]
        until(lambda: client.server_info().activity.num_steps > num_steps, "they are in work")
        os.kill(group[rank].pid, number)
        for call, before in zip(calls, calm, strict=True):
            [image], [true] = call.result().images, before.images
            assert max(abs(a - b) for a, b in zip(image.tobytes(), true.tobytes(), strict=True)) <= 1
    until(lambda: not any(is_left(process) for process in group), "all of the group has ended")
    assert len(ranks(running)) == 2


def test_no_rank_outlives_the_front():
    arguments = ("demo", "--tensor-parallel", "2", "--engine", "native", "--device", "cpu")
    with deployed(*arguments) as deployment:
        group = ranks(deployment)
        os.kill(group[1].pid, signal.SIGSTOP)  # it cannot end by itself
        deployment.stop(signal.SIGKILL)
        until(lambda: not any(is_left(process) for process in group), "no rank is left")


def is_left(process: psutil.Process) -> bool:
    """A zombie has ended; who inherits it may take its time to notice."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE

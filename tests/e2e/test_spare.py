"""The process that waits for a replica to be lost: it takes the place, is replaced, and never outlives the deployment."""

from __future__ import annotations

import contextlib
import os
import signal

import psutil
from deployments import WITH_SPARE, Deployment, deployed, ready_replicas, until

from mii_serve.client import Client

ASKED = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 4}


def spare_of(running: Deployment) -> int:
    until(running.spare_pids, "there is a spare")
    [spare] = running.spare_pids()
    return spare


def has_restarted(client: Client, times: int) -> bool:
    return [replica.num_restarts for replica in ready_replicas(client)] == [times]


def test_a_spare_takes_a_lost_replicas_place_and_is_replaced():
    with deployed("demo", env=WITH_SPARE) as running, Client(running.grpc) as client:
        before = client.generate(**ASKED)
        [first], spare = running.replica_pids(), spare_of(running)
        os.kill(first, signal.SIGKILL)
        until(lambda: has_restarted(client, 1), "the spare is the replica")
        assert running.replica_pids() == [spare]
        assert client.generate(**ASKED).images == before.images

        until(running.spare_pids, "there is another spare")
        os.kill(spare_of(running), signal.SIGKILL)
        os.kill(spare, signal.SIGKILL)
        until(lambda: has_restarted(client, 2), "a spare that is dead is not waited for")
        assert client.generate(**ASKED).images == before.images

        last = spare_of(running)
        assert running.stop() == 0
        assert not psutil.pid_exists(last)


def test_a_killed_front_leaves_no_process_behind():
    with deployed("demo", env=WITH_SPARE, has_model=False) as running:
        processes = [spare_of(running), *running.replica_pids()]
        running.process.kill()
        until(lambda: not any(psutil.pid_exists(pid) for pid in processes), "no orphan is left")


def test_a_spare_that_answers_no_signal_does_not_outlive_a_second_one():
    with deployed("demo", env=WITH_SPARE, has_model=False) as running:
        stopped = [psutil.Process(pid) for pid in (spare_of(running), *running.replica_pids())]
        for process in stopped:
            process.suspend()
        try:
            running.process.send_signal(signal.SIGTERM)
            until(lambda: "draining" in running.logged(), "the first signal has come")
            assert running.stop() == 0
            assert not any(process.is_running() for process in stopped)
        finally:
            for process in stopped:
                with contextlib.suppress(psutil.Error):
                    process.kill()

"""A request that crashes real replica processes: it alone is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from deployments import deployed, until
from timed_engine import POISON

from mii_serve.client import Client
from mii_serve.errors import PoisonedRequestError, UnavailableError
from mii_serve.server.assignment import MAX_CRASHES_ALONE

TIMEOUT_S = 300.0
MOST_CRASHES = 2 + MAX_CRASHES_ALONE
"""Twice among other requests, because a crash may be faster than the word that the request has started; then alone."""


def are_all_ready(client: Client) -> bool:
    try:
        return all(replica.is_ready for replica in client.server_info().replicas)
    except UnavailableError:
        return False


def test_of_the_requests_on_two_replicas_only_the_one_that_crashes_them_is_refused():
    with deployed("demo", "--replicas", "2", has_model=False) as running, Client(running.grpc) as client:

        def make(seed: int):
            return client.generate("a red circle", num_inference_steps=40, scheduler="euler", seed=seed, timeout=TIMEOUT_S)

        def poison() -> str:
            try:
                client.generate(POISON, num_inference_steps=40, timeout=TIMEOUT_S)
            except PoisonedRequestError as error:
                return str(error)
            return "it was made"

        with ThreadPoolExecutor(9) as callers:
            innocents = [callers.submit(make, seed) for seed in range(8)]
            until(lambda: client.server_info().activity.num_running >= 4, "they are in work")
            told = callers.submit(poison).result()
            results = [innocent.result() for innocent in innocents]
        assert "replicas crashed" in told
        assert [list(result.seeds) for result in results] == [[seed] for seed in range(8)]
        assert all(len(result.images) == 1 for result in results)
        until(lambda: are_all_ready(client), "both are back")
        num_restarts = sum(replica.num_restarts for replica in client.server_info().replicas)
        assert num_restarts <= MOST_CRASHES

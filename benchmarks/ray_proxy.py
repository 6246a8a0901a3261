#!/usr/bin/env python3
"""What a call through Ray's proxies costs, compared with the same call on the front's own ports.

    serve run deployment/ray_serve/config.yaml      in another terminal, with one replica
    python benchmarks/ray_proxy.py                  a minute on two CPU cores

Image calls of one step, by turns through the proxy and not; then calls that compute nothing; then a stream of many steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mii_serve.bench import environment
from mii_serve.client import Client

RESULTS = Path(__file__).parent / "results"
ASKED = {"prompt": "a red circle", "num_inference_steps": 1, "scheduler": "euler", "seed": 1, "guidance_scale": 1.0}
STEPS = 200
CALLERS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxied", default="127.0.0.1:9000", metavar="HOST:PORT", help="Ray's gRPC proxy")
    parser.add_argument("--direct", default="127.0.0.1:50050", metavar="HOST:PORT", help="the front's own port")
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS / "ray-proxy.json")
    args = parser.parse_args()
    with Client(args.proxied, max_retries=0) as proxied, Client(args.direct, max_retries=0) as direct:
        clients = {"direct": direct, "proxied": proxied}
        for client in clients.values():
            client.generate(**ASKED)
        result = {
            **environment.circumstances(("grpcio", "ray", "torch")),
            "calls": args.calls,
            "callers": CALLERS,
            "steps": STEPS,
            "image_ms": by_turns(clients, args.calls, lambda client: client.generate(**ASKED)),
            "info_ms": by_turns(clients, args.calls, lambda client: client.server_info()),
            "images_per_s": {name: rate(client, args.calls) for name, client in clients.items()},
            "stream_ms_per_step": by_turns(clients, 5, read_steps, per=STEPS),
        }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def by_turns(
    clients: dict[str, Client], calls: int, call: Callable[[Client], object], *, per: int = 1
) -> dict[str, dict[str, float]]:
    """Median, least and most of the milliseconds of a call, or of each of the parts it has."""
    taken: dict[str, list[float]] = {name: [] for name in clients}
    for _ in range(calls):
        for name, client in clients.items():
            began = time.perf_counter()
            call(client)
            taken[name].append((time.perf_counter() - began) * 1000 / per)
    return {name: _spread(times) for name, times in taken.items()}


def read_steps(client: Client) -> None:
    for _ in client.stream(**{**ASKED, "num_inference_steps": STEPS}):
        pass


def rate(client: Client, calls: int) -> float:
    """Images a second for callers who each wait for theirs."""
    began = time.perf_counter()
    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(lambda _: client.generate(**ASKED), range(calls)))
    return round(calls / (time.perf_counter() - began), 1)


def _spread(times: list[float]) -> dict[str, Any]:
    return {
        "median": round(statistics.median(times), 2),
        "min": round(min(times), 2),
        "p95": round(sorted(times)[int(len(times) * 0.95)], 2),
    }


if __name__ == "__main__":
    main()

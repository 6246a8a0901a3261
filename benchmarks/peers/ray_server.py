"""Ray Serve with `@serve.batch`: up to eight requests that come within 50 ms. Arguments: folder, port."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import serve
from starlette.requests import Request

CORES = len(os.sched_getaffinity(0))


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": CORES})
class Images:
    def __init__(self, folder: str, here: str) -> None:
        sys.path.insert(0, here)
        import pipeline

        self.module, self.pipeline = pipeline, pipeline.load(folder)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.05)
    async def draw(self, bodies: list[dict[str, Any]]) -> list[Any]:
        return await asyncio.to_thread(self.module.draw, self.pipeline, bodies)

    async def __call__(self, request: Request) -> dict[str, Any]:
        return self.module.answer(await self.draw(await request.json()))


if __name__ == "__main__":
    folder, port = sys.argv[1:3]
    # Ray gives an actor as many threads as cores it asks for; the proxy and the controller need some of their own.
    ray.init(num_cpus=CORES + 2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(Images.bind(folder, str(Path(__file__).resolve().parent)), route_prefix="/v1/images/generations")
    threading.Event().wait()

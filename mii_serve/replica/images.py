"""Encodes the images of requests before they are queued, so that a sample joins with its latents and delays no turn.

An engine whose device works by itself encodes beside its turns, on a stream of its own. On a CPU the same cores compute both:
there one image is encoded between two turns. An engine that cannot encode ahead, as one of several ranks, encodes in the turn
that a sample joins.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from mii_serve.engine import Engine
from mii_serve.engine.turns import EncodingEngine
from mii_serve.errors import DeadlineExceededError
from mii_serve.metrics import ReplicaMetrics
from mii_serve.types import GenerationParams, InputImage


class ImageEncoding:
    """All methods are for the loop."""

    def __init__(self, engine: Engine, engine_thread: ThreadPoolExecutor, metrics: ReplicaMetrics) -> None:
        self._engine = engine if isinstance(engine, EncodingEngine) else None
        self._metrics = metrics
        self._own = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._thread = self._own if self._engine is not None and self._engine.encodes_beside else engine_thread
        self._one = asyncio.Lock()  # the next turn is submitted to the same thread, and waits for one image at most

    async def encoded(self, params: GenerationParams, image: InputImage | None, deadline: float | None) -> object | None:
        """What the engine makes of the image; None where it does so later. `deadline` is on the monotonic clock.

        Raises:
            EngineError: the image could not be encoded.
            DeadlineExceededError: other images took the time.
        """
        if self._engine is None or image is None:
            return None
        try:
            async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()), self._one:
                start = time.monotonic()
                running = asyncio.get_running_loop().run_in_executor(self._thread, self._engine.encode_image, params, image)
                try:
                    encoded = await asyncio.shield(running)
                except asyncio.CancelledError:
                    await asyncio.wait((running,))  # none other begins meanwhile
                    raise
        except TimeoutError:
            raise DeadlineExceededError("the time ran out before the image was encoded") from None
        self._metrics.stage("encode", time.monotonic() - start)
        return encoded

    def close(self) -> None:
        self._own.shutdown(wait=True)

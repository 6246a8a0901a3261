"""The replica loop inside the calling process, for one-shot use without a server."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

from mii_serve.config import DeployConfig
from mii_serve.engine import Engine
from mii_serve.errors import EngineError
from mii_serve.metrics import ReplicaMetrics
from mii_serve.provenance import Provenance
from mii_serve.replica.loop import ReplicaLoop
from mii_serve.types import Capabilities, Event, GenerationAnswer, GenerationRequest, ResolvedRequest, draw_seed, gather


class LocalGenerator:
    """Makes images in this process; not thread-safe."""

    def __init__(self, engine: Engine, engine_thread: ThreadPoolExecutor, provenance: Provenance | None = None) -> None:
        self._engine, self._engine_thread, self._provenance = engine, engine_thread, provenance

    @property
    def capabilities(self) -> Capabilities:
        return self._engine.capabilities

    def generate(self, request: GenerationRequest) -> GenerationAnswer:
        """The images of the request.

        Raises:
            MiiServeError: as `stream`.
        """
        with contextlib.closing(self.stream(request)) as events:
            return gather(events)

    def stream(self, request: GenerationRequest) -> Generator[Event, None, None]:
        """The events of the request, `Done` last; closing the generator cancels.

        Raises:
            InvalidRequestError: naming the field and the rule.
            EngineError: the engine failed.
        """
        resolved = self._resolved(request)
        with asyncio.Runner() as runner:
            room = resolved.params.num_images_per_prompt
            replica = ReplicaLoop(self._engine, self._engine_thread, max_waiting_samples=room, provenance=self._provenance)
            events = replica.generate(uuid.uuid4().hex, resolved)
            turns = runner.get_loop().create_task(replica.run())
            try:
                while (event := runner.run(_next(events))) is not None:
                    yield event
            finally:
                runner.run(_stop(replica, events, turns))

    def _resolved(self, request: GenerationRequest) -> ResolvedRequest:
        if request.params.image is None:
            params, image = self.capabilities.resolve(request.params, fallback_seed=draw_seed()), None
        else:
            from mii_serve.safety.input_image import resolve_with_image

            params, image = resolve_with_image(self.capabilities, request.params, fallback_seed=draw_seed())
        return ResolvedRequest(params=params, output=request.output, input_image=image)


async def _next(events: AsyncGenerator[Event, None]) -> Event | None:
    return await anext(events, None)


async def _stop(replica: ReplicaLoop, events: AsyncGenerator[Event, None], turns: asyncio.Task[None]) -> None:
    """The engine outlives the loop: it is to keep no sample of a request that is not read to its end."""
    await events.aclose()
    idle = asyncio.create_task(replica.until_idle())
    await asyncio.wait((idle, turns), return_when=asyncio.FIRST_COMPLETED)
    idle.cancel()
    turns.cancel()
    with contextlib.suppress(asyncio.CancelledError, EngineError):
        await turns


@contextlib.contextmanager
def open_local(config: DeployConfig) -> Iterator[LocalGenerator]:
    """Load the configured model here and free it afterwards.

    Raises:
        ConfigError, ModelError: as `mii_serve deploy` would.
    """
    provenance = Provenance.of(config.provenance)
    with ThreadPoolExecutor(1, thread_name_prefix="engine") as thread:
        engine = thread.submit(build_warm_engine, config).result()
        try:
            yield LocalGenerator(engine, thread, provenance)
        finally:
            thread.submit(engine.close).result()


def build_warm_engine(config: DeployConfig) -> Engine:
    """To be called in the thread that will run the engine.

    Raises:
        ConfigError, ModelError: as `mii_serve deploy` would.
        VerificationError: with the setting `verify`, the engine does not draw what the reference draws.
    """
    if config.verify:
        from mii_serve.verify.runs import build_verified_engine

        return build_verified_engine(config)
    from mii_serve.models.quiet import quiet_libraries

    with quiet_libraries():  # transformers speaks of what is not installed
        from mii_serve.engine.factory import build_engine

    engine = build_engine(config)
    engine.warmup()
    return engine


def build_loop(config: DeployConfig, engine: Engine, engine_thread: ThreadPoolExecutor, provenance: Provenance) -> ReplicaLoop:
    """The loop of a replica that serves, as it is configured; `engine_thread` has built the engine."""
    metrics = ReplicaMetrics()
    if engine.description.device.startswith("cuda"):
        metrics.follow_memory(_gpu_memory)
    return ReplicaLoop(
        engine,
        engine_thread,
        max_waiting_samples=config.max_waiting_samples,
        max_waiting_s=config.max_waiting_s,
        batch_share=config.batch_share,
        metrics=metrics,
        provenance=provenance,
    )


def _gpu_memory() -> dict[str, int]:
    import torch

    return {
        "allocated": torch.cuda.memory_allocated(),
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "total": torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory,
    }

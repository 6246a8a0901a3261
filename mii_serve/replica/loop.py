"""The replica's loop: `plan`, launch, `advance`, again and again, and the events of each request.

All state lives on one asyncio loop; the engine runs in a thread of its own, images are encoded in a few more, and neither
stops the loop. Where the device works by itself, the next turn is planned and launched while one runs (`engine/turns.py`). A
request that is dropped gives its slots back at the next turn that is planned. When the engine fails, everything in flight ends
in a typed error and the loop stops for good: what the device holds is then unknown.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mii_serve.engine import Engine
from mii_serve.engine.turns import TurnResult, Turns
from mii_serve.errors import (
    DeadlineExceededError,
    EngineError,
    EngineLostError,
    InvalidRequestError,
    MiiServeError,
    ProvenanceError,
    UnavailableError,
)
from mii_serve.metrics import ReplicaMetrics
from mii_serve.provenance import Provenance
from mii_serve.replica.encoding import encode_picture
from mii_serve.replica.images import ImageEncoding
from mii_serve.replica.loras import ReplicaLoras
from mii_serve.replica.mailbox import Mailbox
from mii_serve.replica.trace import RequestTrace
from mii_serve.scheduler import Position, Scheduler
from mii_serve.types import (
    LATENT_SCALE,
    Activity,
    Done,
    EffectiveParameters,
    Event,
    ImageReady,
    LatentShape,
    LoraInfo,
    OutputOptions,
    Picture,
    Preview,
    Queued,
    Request,
    ResolvedRequest,
    SampleId,
    SampleProgress,
    Started,
    Step,
)

logger = logging.getLogger(__name__)

NUM_ENCODING_THREADS = 2
NUM_CHECKING_THREADS = 2
"""Beside those: a check may compile a sampler, and a finished image must not wait for that."""

POSITIONS_EVERY_S = 0.5
"""Between two rounds of `Queued` events, at least."""
POSITIONS_PER_S = 40
"""Such events in all: a long queue must not take the time that it waits for."""


class Outlet(Protocol):
    """Takes the events of one request, and the error it ended with, if it did."""

    def put(self, entry: Event | Exception, /) -> None: ...


@dataclass(slots=True, eq=False)
class _Generation:
    """One request from its acceptance to its end."""

    request: Request
    output: OutputOptions
    accepted_at: float
    trace: RequestTrace
    outlet: Outlet
    started_at: float | None = None
    num_images_left: int = 0
    encoding: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    """The encoding of each image that was begun last."""


class ReplicaLoop:
    """Makes the images of any number of concurrent requests."""

    def __init__(
        self,
        engine: Engine,
        engine_thread: ThreadPoolExecutor,
        *,
        max_waiting_samples: int,
        max_waiting_s: float = 600.0,
        batch_share: float = 0.0,
        metrics: ReplicaMetrics | None = None,
        provenance: Provenance | None = None,
    ) -> None:
        """`engine_thread` is the one thread that has built and warmed the engine; it stays its caller's to shut down."""
        self._engine, self._provenance = engine, provenance or Provenance()
        self._loras = ReplicaLoras(engine, engine_thread, self._used_loras)
        self._scheduler = Scheduler(
            engine.capacity,
            max_waiting_samples=max_waiting_samples,
            max_waiting_s=max_waiting_s,
            batch_share=batch_share,
        )
        self.metrics = metrics or ReplicaMetrics()
        self.metrics.follow(self._scheduler)
        described = engine.description
        is_fallback, num_ranks = bool(described.note), described.num_ranks
        self.metrics.engine(described.engine, described.dtype, is_fallback=is_fallback, num_ranks=num_ranks)
        self._generations: dict[str, _Generation] = {}
        self._wake, self._idle = asyncio.Event(), asyncio.Event()
        self._turns = Turns(engine, self._wake_from_thread)
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self._planned: deque[tuple[LatentShape, int]] = deque()
        """The shape of each turn that has not ended, and how many samples it steps."""
        self._failure: MiiServeError | None = None
        self._engine_thread = engine_thread
        self._encoders = ThreadPoolExecutor(NUM_ENCODING_THREADS, thread_name_prefix="encode")
        self._checkers = ThreadPoolExecutor(NUM_CHECKING_THREADS, thread_name_prefix="check")
        self._encoding: set[asyncio.Task[None]] = set()
        self._images = ImageEncoding(engine, engine_thread, self.metrics)
        self._born = time.monotonic()
        self._sent_positions_at = self._born
        self._num_graph_misses = engine.num_graph_misses
        self._num_turns = self._num_steps = self._num_images = self._num_requests = self._num_cancelled = 0

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def queued_work_s(self) -> float:
        """Seconds that all accepted work takes; 0 before the first turn was measured."""
        return self._scheduler.queued_work_s

    def activity(self) -> Activity:
        return Activity(
            uptime_s=time.monotonic() - self._born,
            max_slots=self._engine.capacity.max_slots,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + self._scheduler.batch.num_waiting,
            num_steps=self._num_steps,
            num_images=self._num_images,
            num_requests=self._num_requests,
            num_cancelled_requests=self._num_cancelled,
            num_turns=self._num_turns,
            num_graph_misses=self._engine.num_graph_misses,
            max_cells_per_call=self._engine.capacity.max_latent_pixels_per_call,
        )

    async def generate(
        self, request_id: str, request: ResolvedRequest, *, client: str = "", timeout_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """The events of one request, `Done` last; leaving the iteration early drops it.

        Raises:
            MiiServeError: as `submit`, and the error that it ended with.
        """
        mailbox, event = Mailbox(), None
        await self.submit(request_id, request, mailbox, client=client, timeout_s=timeout_s)
        try:
            while not isinstance(event, Done):
                event = await mailbox.get()
                yield event
        finally:
            self.drop(request_id)

    async def submit(
        self,
        request_id: str,
        resolved: ResolvedRequest,
        outlet: Outlet,
        *,
        client: str = "",
        timeout_s: float | None = None,
        traceparent: str | None = None,
    ) -> None:
        """Accept a request; its events go to the `outlet` until `Done` or an error.

        Spans of the work are children of `traceparent`.

        Raises:
            InvalidRequestError: the id is in use, or the schedulers cannot do what is asked.
            QueueFullError: no room.
            EngineError: the request's image could not be encoded.
            DeadlineExceededError: it cannot be done in `timeout_s`.
            UnavailableError: the loop has stopped.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._refuse_if_stopped()
        params, output = resolved.params, resolved.output
        num_calls = await asyncio.get_running_loop().run_in_executor(self._checkers, self._engine.check, params)
        encoded_image = await self._images.encoded(params, resolved.input_image, deadline)
        self._refuse_if_stopped()
        if request_id in self._generations:
            raise InvalidRequestError("x-request-id", "must not be in use by a running request", repr(request_id))
        now = time.monotonic()
        request = Request(
            id=request_id,
            params=params,
            num_calls=num_calls,
            client=client,
            priority=resolved.priority,
            deadline=deadline,
            preview_every=output.preview_every,
            input_image=resolved.input_image,
            encoded_image=encoded_image,
        )
        position = self._scheduler.add(request, now)
        generation = self._generations[request_id] = _Generation(
            request, output, now, RequestTrace(traceparent, now), outlet, num_images_left=params.num_images_per_prompt
        )
        self._num_requests += 1
        self._wake.set()
        generation.outlet.put(_queued(position))

    async def load_lora(self, name: str, path: Path) -> LoraInfo:
        """Let requests name a LoRA from now on. Its files are read beside the turns.

        Raises:
            InvalidRequestError: the files cannot be used.
            UnsupportedError: this engine computes no LoRAs, or not those that come at run time.
        """
        self._refuse_if_stopped()
        return await self._loras.load(name, path)

    async def remove_lora(self, name: str) -> None:
        """Let no new request name it; nothing happens where there is none."""
        await self._loras.remove(name)

    def drop(self, request_id: str) -> None:
        """Forget a request; nothing happens if it has ended."""
        if (generation := self._generations.get(request_id)) is not None:
            self._end(generation)
            self._num_cancelled += self._failure is None

    def _used_loras(self) -> set[str]:
        """The revisions that requests in flight need."""
        used = [generation.request.params.lora_choice for generation in self._generations.values()]
        return {revision for choice in used for revision, _ in choice.parts}

    def _end(self, generation: _Generation) -> None:
        del self._generations[generation.request.id]
        self._loras.forget_unused()
        self._scheduler.drop(generation.request.id)
        self._idle.clear()
        self._wake.set()

    def _fail(self, generation: _Generation, error: MiiServeError) -> None:
        """End the request with this error."""
        if self._generations.get(generation.request.id) is generation:
            self.drop(generation.request.id)
            generation.outlet.put(error)

    async def run(self) -> None:
        """Take turns until cancelled.

        Raises:
            EngineError: the engine failed; this loop is finished.
        """
        loop = self._asyncio = asyncio.get_running_loop()
        try:
            while True:
                self._wake.clear()
                self._expire()
                if (plan := self._scheduler.plan()) is not None:
                    self._planned.append((self._scheduler.planned_shape, len(plan.steps)))
                    for sample in plan.joins:
                        self._report_start(sample.id)
                elif self._turns.is_idle:
                    self._idle.set()
                    await self._wake.wait()
                    self._idle.clear()
                    continue
                for result in await loop.run_in_executor(self._engine_thread, self._turns.step, plan):
                    self._take_in(result)
                self._report_positions()
        except EngineError as error:
            logger.exception("the engine failed with %d requests in flight", len(self._generations))
            self._fail_all(EngineLostError(str(error)))
            raise
        finally:
            self._fail_all(UnavailableError("the replica is stopping"))
            self._encoders.shutdown(wait=True)
            self._checkers.shutdown(wait=True)
            self._images.close()

    async def until_idle(self) -> None:
        """Wait until there is nothing to do: the engine has forgotten the samples of every request that has ended."""
        await self._idle.wait()

    def _wake_from_thread(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            if self._asyncio is not None:
                self._asyncio.call_soon_threadsafe(self._wake.set)

    def _take_in(self, result: TurnResult) -> None:
        if result.is_turn:
            shape, num_steps = self._planned.popleft()
            self._scheduler.advance(result.progress, result.elapsed_s)
            self._num_turns += bool(num_steps)
            self._num_steps += num_steps
            self._measure_turn(shape, num_steps, result)
        else:
            for progress in result.progress:
                if progress.is_over:
                    self._scheduler.end(progress)
            for stage, seconds in result.stages.items():
                self.metrics.stage(stage, seconds)
        for progress in result.progress:
            self._trace(progress, result.started_at, result.stages)
            self._report(progress, has_stepped=result.is_turn)

    def _measure_turn(self, latent_shape: LatentShape, num_steps: int, result: TurnResult) -> None:
        height, width = latent_shape
        shape_px = height * LATENT_SCALE, width * LATENT_SCALE
        self.metrics.turn(self._engine.description.engine, shape_px, num_steps, result.stages)
        num_misses = self._engine.num_graph_misses
        self.metrics.graph_misses.inc(num_misses - self._num_graph_misses)
        self._num_graph_misses = num_misses

    def _trace(self, progress: SampleProgress, start: float, stages: Mapping[str, float]) -> None:
        if generation := self._generations.get(progress.id.request_id):
            generation.trace.advanced(progress.id.image_index, start, stages, is_over=progress.is_over)

    def _refuse_if_stopped(self) -> None:
        if self._failure is not None:
            raise UnavailableError(f"the replica has stopped: {self._failure}")

    def _fail_all(self, error: MiiServeError) -> None:
        self._failure = self._failure or error
        for generation in list(self._generations.values()):
            self._fail(generation, error)

    def _expire(self) -> None:
        for request_id in self._scheduler.expire(time.monotonic()):
            if generation := self._generations.get(request_id):
                self._fail(generation, DeadlineExceededError("the pictures were not ready in time"))

    def _report_positions(self) -> None:
        now = time.monotonic()
        pause_s = max(POSITIONS_EVERY_S, self._scheduler.num_waiting / POSITIONS_PER_S)
        if not self._scheduler.num_waiting or now - self._sent_positions_at < pause_s:
            return
        self._sent_positions_at = now
        for request_id, position in self._scheduler.positions():
            if generation := self._generations.get(request_id):
                generation.outlet.put(_queued(position))

    def _report_start(self, sample_id: SampleId) -> None:
        if generation := self._generations.get(sample_id.request_id):
            now = time.monotonic()
            generation.started_at = generation.started_at or now
            generation.trace.joined(sample_id.image_index, now)
            generation.outlet.put(Started(image_index=sample_id.image_index))

    def _report(self, progress: SampleProgress, *, has_stepped: bool) -> None:
        generation = self._generations.get(progress.id.request_id)
        if generation is None:
            return
        if progress.error is not None:
            self._fail(generation, progress.error)
            return
        index = progress.id.image_index
        if has_stepped:
            left_s = 0.0 if progress.is_over else self._scheduler.remaining_s(progress.id)
            step = Step(image_index=index, step=progress.step, num_steps=progress.num_steps, estimated_left_s=left_s)
            generation.outlet.put(step)
        if (preview := progress.preview) is not None:
            before = generation.encoding.get(index)
            self._start(generation, index, self._send_preview(generation, index, progress.step, preview, before))
        if (picture := progress.picture) is not None:
            before = generation.encoding.get(index)
            self._start(generation, index, self._send_image(generation, index, picture, before))

    def _start(self, generation: _Generation, index: int, sending: Coroutine[None, None, None]) -> None:
        """Encode beside the turns; several files of one image may be encoded at once, and are sent in their order."""
        task = generation.encoding[index] = asyncio.create_task(sending)
        self._encoding.add(task)
        task.add_done_callback(self._encoding.discard)

    async def _encode(
        self, generation: _Generation, index: int, picture: Picture, before: asyncio.Task[None] | None
    ) -> tuple[bytes, EffectiveParameters] | None:
        """The file, once the one begun `before` has been sent; None where the request has ended meanwhile."""
        request = generation.request
        parameters = EffectiveParameters.of(
            request.params,
            self._engine.description,
            self._engine.describe_scheduler(request.params),
            dropped_prompt=picture.dropped_prompt,
            dropped_negative_prompt=picture.dropped_negative_prompt,
        )
        seed = request.params.seed_of(index)
        loop, start = asyncio.get_running_loop(), time.monotonic()
        try:
            output = generation.output
            encoded = await loop.run_in_executor(
                self._encoders, encode_picture, picture, output, parameters, seed, self._provenance
            )
        except ProvenanceError as error:
            logger.exception("a picture could not be marked, request_id=%s", request.id)
            self._fail(generation, error)
            return None
        except Exception as error:
            logger.exception("a picture could not be encoded, request_id=%s", request.id)
            self._fail(generation, EngineError(f"the picture could not be encoded: {type(error).__name__}"))
            return None
        end = time.monotonic()
        self.metrics.stage("encode_image", end - start)
        generation.trace.encoded(index, start, end)
        if before is not None:
            await asyncio.wait((before,))
        return (encoded, parameters) if self._generations.get(request.id) is generation else None

    async def _send_preview(
        self, generation: _Generation, index: int, step: int, picture: Picture, before: asyncio.Task[None] | None
    ) -> None:
        encoded = await self._encode(generation, index, picture, before)
        if encoded is not None:
            generation.outlet.put(
                Preview(
                    image_index=index,
                    step=step,
                    encoded=encoded[0],
                    format=generation.output.format,
                    height=picture.height,
                    width=picture.width,
                    nsfw_content_detected=picture.nsfw_content_detected,
                )
            )

    async def _send_image(
        self, generation: _Generation, index: int, picture: Picture, before: asyncio.Task[None] | None
    ) -> None:
        encoded = await self._encode(generation, index, picture, before)
        if encoded is None:
            return
        self._num_images += 1
        self.metrics.images.inc()
        self.metrics.images_flagged.inc(bool(picture.nsfw_content_detected))
        generation.outlet.put(
            ImageReady(
                image_index=index,
                encoded=encoded[0],
                format=generation.output.format,
                height=picture.height,
                width=picture.width,
                seed=generation.request.params.seed_of(index),
                nsfw_content_detected=picture.nsfw_content_detected,
            )
        )
        generation.num_images_left -= 1
        if generation.num_images_left == 0:
            now, started_at = time.monotonic(), generation.started_at or generation.accepted_at
            queued_s, total_s = started_at - generation.accepted_at, now - generation.accepted_at
            self._end(generation)
            generation.outlet.put(Done(parameters=encoded[1], queued_s=queued_s, total_s=total_s))


def _queued(position: Position) -> Queued:
    return Queued(num_samples_ahead=position.num_samples_ahead, estimated_wait_s=position.estimated_wait_s)

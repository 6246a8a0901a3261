"""The replica's heart: `plan`, `run`, `advance`, again and again, and the events that tell each caller how far it is.

All state lives on one asyncio loop; the engine runs in a thread of its own, pictures are encoded in a few more, and neither
stops the loop. A caller that goes away gives its slots back at the next turn. When the engine fails, everything in flight
ends in a typed error and the loop stops for good: what the device holds is then unknown.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from mii_serve.engine import Engine
from mii_serve.errors import (
    DeadlineExceededError,
    EngineError,
    EngineLostError,
    InvalidRequestError,
    MiiServeError,
    UnavailableError,
)
from mii_serve.metrics import ReplicaMetrics
from mii_serve.proto.codec import Activity
from mii_serve.replica.encoding import encode_picture
from mii_serve.replica.trace import RequestTrace
from mii_serve.scheduler import Position, Scheduler
from mii_serve.types import (
    LATENT_SCALE,
    Done,
    Effective,
    Event,
    GenerationParams,
    ImageReady,
    OutputOptions,
    Picture,
    Preview,
    Priority,
    Queued,
    Request,
    SampleId,
    SampleProgress,
    Started,
    Step,
)

logger = logging.getLogger(__name__)

NUM_ENCODING_THREADS = 2

POSITIONS_EVERY_S = 0.5
"""Between two looks at where everybody is in line, at least."""
POSITIONS_PER_S = 40
"""Told in all: a long line must not take the time it waits for."""


class _Mailbox:
    """Events on their way to one caller. Of the news a slow caller has not yet read, only the latest is kept."""

    def __init__(self) -> None:
        self._events: deque[Event | MiiServeError] = deque()
        self._arrived = asyncio.Event()

    def put(self, event: Event | MiiServeError) -> None:
        if isinstance(event, Queued | Step | Preview):
            for old in [old for old in self._events if _is_news_of_the_same(old, event)]:
                self._events.remove(old)
        self._events.append(event)
        self._arrived.set()

    async def get(self) -> Event:
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        if isinstance(event, MiiServeError):
            raise event
        return event


def _is_news_of_the_same(old: Event | MiiServeError, new: Queued | Step | Preview) -> bool:
    return type(old) is type(new) and getattr(old, "image_index", None) == getattr(new, "image_index", None)


@dataclass(slots=True, eq=False)
class _Caller:
    request: Request
    output: OutputOptions
    accepted_at: float
    trace: RequestTrace
    mailbox: _Mailbox = field(default_factory=_Mailbox)
    started_at: float | None = None
    num_images_left: int = 0
    encoding: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    """What was last begun to be encoded of each image."""


class ReplicaLoop:
    """Makes pictures for any number of concurrent callers of `generate`."""

    def __init__(
        self,
        engine: Engine,
        engine_thread: ThreadPoolExecutor,
        *,
        max_waiting_samples: int,
        max_waiting_s: float = 600.0,
        metrics: ReplicaMetrics | None = None,
    ) -> None:
        """`engine_thread` is the one thread that has built and warmed the engine; it stays its caller's to shut down."""
        self._engine = engine
        self._scheduler = Scheduler(engine.capacity, max_waiting_samples=max_waiting_samples, max_waiting_s=max_waiting_s)
        self.metrics = metrics or ReplicaMetrics()
        self.metrics.follow(self._scheduler)
        described = engine.description
        self.metrics.engine(described.engine, described.dtype, is_fallback=bool(described.note))
        self._callers: dict[str, _Caller] = {}
        self._wake = asyncio.Event()
        self._failure: MiiServeError | None = None
        self._engine_thread = engine_thread
        self._encoders = ThreadPoolExecutor(NUM_ENCODING_THREADS, thread_name_prefix="encode")
        self._encoding: set[asyncio.Task[None]] = set()
        self._born = time.monotonic()
        self._told_positions_at = self._born
        self._num_graph_misses = engine.num_graph_misses
        self._num_turns = self._num_steps = self._num_images = self._num_requests = self._num_cancelled = 0

    @property
    def engine(self) -> Engine:
        return self._engine

    def activity(self) -> Activity:
        return Activity(
            uptime_s=time.monotonic() - self._born,
            max_slots=self._engine.capacity.max_slots,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_steps=self._num_steps,
            num_images=self._num_images,
            num_requests=self._num_requests,
            num_cancelled_requests=self._num_cancelled,
            num_turns=self._num_turns,
            num_graph_misses=self._engine.num_graph_misses,
            max_cells_per_call=self._engine.capacity.max_latent_pixels_per_call,
        )

    async def generate(
        self,
        request_id: str,
        params: GenerationParams,
        output: OutputOptions,
        *,
        client: str = "",
        priority: Priority = Priority.NORMAL,
        timeout_s: float | None = None,
        traceparent: str | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Make the pictures of one request; leaving the iteration early cancels it.

        Spans of the work hang below `traceparent`.

        Raises:
            InvalidRequestError: the id is in use, or the schedulers cannot do what is asked.
            QueueFullError: no room.
            DeadlineExceededError: it cannot be done in `timeout_s`, or was not.
            UnavailableError: the loop has stopped.
            EngineError: the engine failed while this request was in flight.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._refuse_if_stopped()
        num_calls = await asyncio.get_running_loop().run_in_executor(self._encoders, self._engine.check, params)
        self._refuse_if_stopped()
        if request_id in self._callers:
            raise InvalidRequestError("x-request-id", "must not be in use by a running request", repr(request_id))
        now = time.monotonic()
        request = Request(
            id=request_id,
            params=params,
            num_calls=num_calls,
            client=client,
            priority=priority,
            deadline=deadline,
            preview_every=output.preview_every,
        )
        position = self._scheduler.add(request, now)
        caller = self._callers[request_id] = _Caller(
            request, output, now, RequestTrace(traceparent, now), num_images_left=params.num_images_per_prompt
        )
        self._num_requests += 1
        self._wake.set()
        caller.mailbox.put(_queued(position))
        is_done = False
        try:
            while not is_done:
                event = await caller.mailbox.get()
                is_done = isinstance(event, Done)
                yield event
        finally:
            del self._callers[request_id]
            self._scheduler.drop(request_id)
            self._wake.set()
            if not is_done and self._failure is None:
                self._num_cancelled += 1

    async def run(self) -> None:
        """Take turns until cancelled.

        Raises:
            EngineError: the engine failed; this loop is finished.
        """
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._expire()
                plan = self._scheduler.plan()
                if plan is None:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                for sample in plan.joins:
                    self._tell_started(sample.id)
                start = time.monotonic()
                progress = await loop.run_in_executor(self._engine_thread, self._engine.run, plan)
                self._scheduler.advance(progress, time.monotonic() - start)
                stages = self._engine.stage_seconds()
                self._measure(len(plan.steps), stages)
                self._num_turns += bool(plan.steps)
                self._num_steps += len(plan.steps)
                for sample_progress in progress:
                    self._trace(sample_progress, start, stages)
                    self._tell(sample_progress)
                self._tell_positions()
        except EngineError as error:
            logger.exception("the engine failed with %d requests in flight", len(self._callers))
            self._fail_all(EngineLostError(str(error)))
            raise
        finally:
            self._fail_all(UnavailableError("the replica is stopping"))
            self._encoders.shutdown(wait=True)

    def _measure(self, batch: int, stages: dict[str, float]) -> None:
        height, width = self._scheduler.planned_shape
        shape_px = height * LATENT_SCALE, width * LATENT_SCALE
        self.metrics.turn(self._engine.description.engine, shape_px, batch, stages)
        num_misses = self._engine.num_graph_misses
        self.metrics.graph_misses.inc(num_misses - self._num_graph_misses)
        self._num_graph_misses = num_misses

    def _trace(self, progress: SampleProgress, start: float, stages: dict[str, float]) -> None:
        if caller := self._callers.get(progress.id.request_id):
            caller.trace.advanced(progress.id.image_index, start, stages, is_over=progress.is_over)

    def _refuse_if_stopped(self) -> None:
        if self._failure is not None:
            raise UnavailableError(f"the replica has stopped: {self._failure}")

    def _fail_all(self, error: MiiServeError) -> None:
        self._failure = self._failure or error
        for caller in self._callers.values():
            caller.mailbox.put(error)

    def _expire(self) -> None:
        for request_id in self._scheduler.expire(time.monotonic()):
            if caller := self._callers.get(request_id):
                caller.mailbox.put(DeadlineExceededError("the pictures were not ready in time"))

    def _tell_positions(self) -> None:
        now = time.monotonic()
        pause_s = max(POSITIONS_EVERY_S, self._scheduler.num_waiting / POSITIONS_PER_S)
        if not self._scheduler.num_waiting or now - self._told_positions_at < pause_s:
            return
        self._told_positions_at = now
        for request_id, position in self._scheduler.positions():
            if caller := self._callers.get(request_id):
                caller.mailbox.put(_queued(position))

    def _tell_started(self, sample_id: SampleId) -> None:
        if caller := self._callers.get(sample_id.request_id):
            now = time.monotonic()
            caller.started_at = caller.started_at or now
            caller.trace.joined(sample_id.image_index, now)
            caller.mailbox.put(Started(image_index=sample_id.image_index))

    def _tell(self, progress: SampleProgress) -> None:
        caller = self._callers.get(progress.id.request_id)
        if caller is None:
            return
        if progress.error is not None:
            caller.mailbox.put(progress.error)
            return
        index, left_s = progress.id.image_index, 0.0 if progress.is_over else self._scheduler.remaining_s(progress.id)
        step = Step(image_index=index, step=progress.step, num_steps=progress.num_steps, estimated_left_s=left_s)
        caller.mailbox.put(step)
        if progress.preview is not None:
            self._start(caller, index, self._show(caller, index, progress.step, progress.preview, caller.encoding.get(index)))
        if progress.picture is not None:
            self._start(caller, index, self._hand_over(caller, index, progress.picture, caller.encoding.get(index)))

    def _start(self, caller: _Caller, index: int, encoding: Coroutine[None, None, None]) -> None:
        """Encode beside the turns; several of one image may be encoded at once, and are told of in their order."""
        task = caller.encoding[index] = asyncio.create_task(encoding)
        self._encoding.add(task)
        task.add_done_callback(self._encoding.discard)

    async def _encode(
        self, caller: _Caller, index: int, picture: Picture, before: asyncio.Task[None] | None
    ) -> tuple[bytes, Effective] | None:
        """The file, once what was begun `before` has been told of; None where that failed, which the caller has been told."""
        effective = Effective(
            params=caller.request.params,
            engine=self._engine.description,
            scheduler=self._engine.describe_scheduler(caller.request.params),
            dropped_prompt=picture.dropped_prompt,
            dropped_negative_prompt=picture.dropped_negative_prompt,
        )
        seed = caller.request.params.seed_of(index)
        loop, start = asyncio.get_running_loop(), time.monotonic()
        try:
            encoded = await loop.run_in_executor(self._encoders, encode_picture, picture, caller.output, effective, seed)
        except Exception as error:
            logger.exception("a picture could not be encoded, request_id=%s", caller.request.id)
            caller.mailbox.put(EngineError(f"the picture could not be encoded: {type(error).__name__}"))
            return None
        end = time.monotonic()
        self.metrics.stage("encode_image", end - start)
        caller.trace.encoded(index, start, end)
        if before is not None:
            await asyncio.wait((before,))
        return encoded, effective

    async def _show(self, caller: _Caller, index: int, step: int, picture: Picture, before: asyncio.Task[None] | None) -> None:
        if (made := await self._encode(caller, index, picture, before)) is None:
            return
        caller.mailbox.put(
            Preview(
                image_index=index,
                step=step,
                encoded=made[0],
                format=caller.output.format,
                height=picture.height,
                width=picture.width,
                nsfw_content_detected=picture.nsfw_content_detected,
            )
        )

    async def _hand_over(self, caller: _Caller, index: int, picture: Picture, before: asyncio.Task[None] | None) -> None:
        if (made := await self._encode(caller, index, picture, before)) is None:
            return
        encoded, effective = made
        self._num_images += 1
        self.metrics.images.inc()
        self.metrics.images_flagged.inc(bool(picture.nsfw_content_detected))
        caller.mailbox.put(
            ImageReady(
                image_index=index,
                encoded=encoded,
                format=caller.output.format,
                height=picture.height,
                width=picture.width,
                seed=caller.request.params.seed_of(index),
                nsfw_content_detected=picture.nsfw_content_detected,
            )
        )
        caller.num_images_left -= 1
        if caller.num_images_left == 0:
            now, started_at = time.monotonic(), caller.started_at or caller.accepted_at
            queued_s, total_s = started_at - caller.accepted_at, now - caller.accepted_at
            caller.mailbox.put(Done(effective=effective, queued_s=queued_s, total_s=total_s))


def _queued(position: Position) -> Queued:
    return Queued(num_samples_ahead=position.num_samples_ahead, estimated_wait_s=position.estimated_wait_s)

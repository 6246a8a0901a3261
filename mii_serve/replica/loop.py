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
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from mii_serve.engine import Engine
from mii_serve.errors import EngineError, InvalidRequestError, MiiServeError, UnavailableError
from mii_serve.proto.codec import Activity
from mii_serve.replica.encoding import encode_picture
from mii_serve.scheduler import Scheduler
from mii_serve.types import (
    Done,
    Effective,
    EngineCapacity,
    Event,
    GenerationParams,
    ImageReady,
    OutputOptions,
    Picture,
    Queued,
    SampleId,
    SampleProgress,
    Started,
    Step,
)

logger = logging.getLogger(__name__)

NUM_ENCODING_THREADS = 2


class _Mailbox:
    """Events on their way to one caller. Of the steps a slow caller has not yet read, only the latest is kept."""

    def __init__(self) -> None:
        self._events: deque[Event | MiiServeError] = deque()
        self._arrived = asyncio.Event()

    def put(self, event: Event | MiiServeError) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(event, Step) and isinstance(last, Step) and last.image_index == event.image_index:
            self._events.pop()
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


@dataclass(slots=True, eq=False)
class _Request:
    request_id: str
    params: GenerationParams
    output: OutputOptions
    accepted_at: float
    mailbox: _Mailbox = field(default_factory=_Mailbox)
    started_at: float | None = None
    num_images_left: int = 0


class ReplicaLoop:
    """Makes pictures for any number of concurrent callers of `generate`."""

    def __init__(
        self, engine: Engine, capacity: EngineCapacity, engine_thread: ThreadPoolExecutor, *, max_waiting_samples: int
    ) -> None:
        """`engine_thread` is the one thread that has built and warmed the engine; it stays its caller's to shut down."""
        self._engine = engine
        self._capacity = capacity
        self._scheduler = Scheduler(max_slots=capacity.max_slots, max_waiting_samples=max_waiting_samples)
        self._requests: dict[str, _Request] = {}
        self._wake = asyncio.Event()
        self._failure: MiiServeError | None = None
        self._engine_thread = engine_thread
        self._encoders = ThreadPoolExecutor(NUM_ENCODING_THREADS, thread_name_prefix="encode")
        self._encoding: set[asyncio.Task[None]] = set()
        self._born = time.monotonic()
        self._num_steps = self._num_images = self._num_requests = self._num_cancelled = 0

    @property
    def engine(self) -> Engine:
        return self._engine

    def activity(self) -> Activity:
        return Activity(
            uptime_s=time.monotonic() - self._born,
            max_slots=self._capacity.max_slots,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_steps=self._num_steps,
            num_images=self._num_images,
            num_requests=self._num_requests,
            num_cancelled_requests=self._num_cancelled,
        )

    async def generate(self, request_id: str, params: GenerationParams, output: OutputOptions) -> AsyncGenerator[Event, None]:
        """Make the pictures of one request; leaving the iteration early cancels it.

        Raises:
            InvalidRequestError: the id is in use, or the schedulers cannot do what is asked.
            QueueFullError: no room.
            UnavailableError: the loop has stopped.
            EngineError: the engine failed while this request was in flight.
        """
        self._refuse_if_stopped()
        await asyncio.get_running_loop().run_in_executor(self._encoders, self._engine.check, params)
        self._refuse_if_stopped()
        if request_id in self._requests:
            raise InvalidRequestError("x-request-id", "must not be in use by a running request", repr(request_id))
        request = _Request(request_id, params, output, time.monotonic())
        request.num_images_left = params.num_images_per_prompt
        ahead = self._scheduler.add(request_id, params)
        self._requests[request_id] = request
        self._num_requests += 1
        self._wake.set()
        request.mailbox.put(Queued(num_samples_ahead=ahead))
        is_done = False
        try:
            while not is_done:
                event = await request.mailbox.get()
                is_done = isinstance(event, Done)
                yield event
        finally:
            del self._requests[request_id]
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
                plan = self._scheduler.plan()
                if plan is None:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                for sample in plan.joins:
                    self._tell_started(sample.id)
                progress = await loop.run_in_executor(self._engine_thread, self._engine.run, plan)
                self._scheduler.advance(progress)
                for sample_progress in progress:
                    self._tell(sample_progress)
        except EngineError as error:
            logger.exception("the engine failed with %d requests in flight", len(self._requests))
            self._fail_all(error)
            raise
        finally:
            self._fail_all(UnavailableError("the replica is stopping"))
            self._encoders.shutdown(wait=True)

    def _refuse_if_stopped(self) -> None:
        if self._failure is not None:
            raise UnavailableError(f"the replica has stopped: {self._failure}")

    def _fail_all(self, error: MiiServeError) -> None:
        self._failure = self._failure or error
        for request in self._requests.values():
            request.mailbox.put(error)

    def _tell_started(self, sample_id: SampleId) -> None:
        if request := self._requests.get(sample_id.request_id):
            request.started_at = request.started_at or time.monotonic()
            request.mailbox.put(Started(image_index=sample_id.image_index))

    def _tell(self, progress: SampleProgress) -> None:
        self._num_steps += 1
        request = self._requests.get(progress.id.request_id)
        if request is None:
            return
        if progress.error is not None:
            request.mailbox.put(progress.error)
            return
        index = progress.id.image_index
        request.mailbox.put(Step(image_index=index, step=progress.step, num_steps=progress.num_steps))
        if progress.picture is not None:
            task = asyncio.create_task(self._hand_over(request, index, progress.picture))
            self._encoding.add(task)
            task.add_done_callback(self._encoding.discard)

    async def _hand_over(self, request: _Request, index: int, picture: Picture) -> None:
        effective = Effective(
            params=request.params,
            engine=self._engine.description,
            dropped_prompt=picture.dropped_prompt,
            dropped_negative_prompt=picture.dropped_negative_prompt,
        )
        seed = request.params.seed_of(index)
        loop = asyncio.get_running_loop()
        try:
            encoded = await loop.run_in_executor(self._encoders, encode_picture, picture, request.output, effective, seed)
        except Exception as error:
            logger.exception("a picture could not be encoded, request_id=%s", request.request_id)
            request.mailbox.put(EngineError(f"the picture could not be encoded: {type(error).__name__}"))
            return
        self._num_images += 1
        request.mailbox.put(
            ImageReady(
                image_index=index,
                encoded=encoded,
                format=request.output.format,
                height=picture.height,
                width=picture.width,
                seed=seed,
                nsfw_content_detected=picture.nsfw_content_detected,
            )
        )
        request.num_images_left -= 1
        if request.num_images_left == 0:
            now, started_at = time.monotonic(), request.started_at or request.accepted_at
            queued_s, total_s = started_at - request.accepted_at, now - request.accepted_at
            request.mailbox.put(Done(effective=effective, queued_s=queued_s, total_s=total_s))

"""Idempotency keys: a request with a key is worked on once, and later requests with the same key get the same images.

A caller whose connection broke may send a request again without knowing whether the first one arrived. While it runs, later
ones join it; for a while afterwards its answer is repeated. A request that failed is forgotten, so that the next one runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from mii_serve.errors import DeadlineExceededError, InvalidRequestError, MiiServeError, RequestCancelledError, UnavailableError
from mii_serve.proto.metadata import IDEMPOTENCY_KEY
from mii_serve.types import Done, Event, ImageReady, Preview, Queued, ResolvedRequest, Step

KEEP_S = 600.0
MAX_BYTES = 256 * 1024 * 1024
"""Of images kept; the oldest answers go first."""
GRACE_S = 10.0
"""A request that no caller waits for goes on for so long, in case its caller comes back."""

Key = tuple[str, str, int | None]
"""The API key's owner, where there are API keys; the key; which request of its call. One caller cannot see another's images by
guessing a key."""
Run = Callable[[ResolvedRequest], AsyncGenerator[Event, None]]

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Entry:
    """One request and its events so far; None where a later event of the same kind has replaced one."""

    fingerprint: bytes
    request: ResolvedRequest
    events: list[Event | None] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    task: asyncio.Task[None] | None = None
    error: MiiServeError | None = None
    is_over: bool = False
    ended_at: float = 0.0
    num_readers: int = 0
    stopping: asyncio.TimerHandle | None = None
    """Ends it unless a reader comes back before."""
    num_bytes: int = 0


class IdempotencyCache:
    """The requests with a key, running or kept."""

    def __init__(self, *, max_bytes: int = MAX_BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        self._works: OrderedDict[Key, _Entry] = OrderedDict()
        self._max_bytes = max_bytes
        self._clock = clock

    async def events(self, key: Key, fingerprint: bytes, request: ResolvedRequest, run: Run) -> AsyncGenerator[Event, None]:
        """The events of the work under this key, made by `run` if this is the first call for it.

        `fingerprint` tells requests apart as they were asked for; `request` may have a seed that was drawn for this call.

        Raises:
            InvalidRequestError: the key was used for another request.
            UnavailableError: the work began again with another seed when images had been given out already.
            MiiServeError: what the work ended with.
        """
        self._forget_old()
        given = set[int]()
        while True:
            work = self._works.get(key)
            is_mine = work is None
            if work is None:
                work = self._works[key] = _Entry(fingerprint, request)
                work.task = asyncio.create_task(self._run(key, work, run))
            elif work.fingerprint != fingerprint:
                raise InvalidRequestError(IDEMPOTENCY_KEY, "was used for another request already", repr(key[1]))
            elif given and work.request != request:
                raise UnavailableError(
                    "the work under this idempotency key ended early and began again; send the request again"
                )
            try:
                async with contextlib.aclosing(_joined(work)) as events:
                    async for event in events:
                        if isinstance(event, ImageReady):
                            if event.image_index in given:
                                continue
                            given.add(event.image_index)
                        yield event
                return
            except (DeadlineExceededError, RequestCancelledError):
                if is_mine:  # else it was the first caller's time that ran out, not ours
                    raise
                request = work.request  # so that images made from now on go with those given out

    async def _run(self, key: Key, work: _Entry, run: Run) -> None:
        latest: dict[tuple[type, int], int] = {}
        try:
            async with contextlib.aclosing(run(work.request)) as events:
                async for event in events:
                    if isinstance(event, Step | Queued):  # a slow or late reader needs the latest only
                        of = type(event), getattr(event, "image_index", 0)
                        if (old := latest.get(of)) is not None:
                            work.events[old] = None
                        latest[of] = len(work.events)
                    work.events.append(event)
                    await _announce(work)
        except MiiServeError as error:
            work.error = error
        except asyncio.CancelledError:
            work.error = RequestCancelledError("no caller waited for the images any more")
        except Exception:
            logger.exception("unexpected error in work with an idempotency key")
        finally:
            work.error = work.error or (None if _is_whole(work) else MiiServeError("the work broke off"))
            work.is_over, work.ended_at = True, self._clock()
            if work.error is not None:
                del self._works[key]
            else:
                self._works.move_to_end(key)
                work.num_bytes = sum(len(event.encoded) for event in work.events if isinstance(event, ImageReady | Preview))
                self._forget_old()
            await _announce(work)

    def _forget_old(self) -> None:
        done = [(key, work) for key, work in self._works.items() if work.is_over]
        num_bytes = sum(work.num_bytes for _, work in done)
        for key, work in done:
            if num_bytes <= self._max_bytes and self._clock() - work.ended_at <= KEEP_S:
                break
            num_bytes -= work.num_bytes
            del self._works[key]


async def _joined(work: _Entry) -> AsyncGenerator[Event, None]:
    """What `_read` gives; work whose last reader leaves early ends soon."""
    work.num_readers += 1
    if work.stopping is not None:
        work.stopping.cancel()
        work.stopping = None
    try:
        async with contextlib.aclosing(_read(work)) as events:
            async for event in events:
                yield event
    finally:
        work.num_readers -= 1
        if not work.num_readers and not work.is_over:
            work.stopping = asyncio.get_running_loop().call_later(GRACE_S, _stop, work)


async def _read(work: _Entry) -> AsyncGenerator[Event, None]:
    """All events so far and to come; of work that is over, only those that make the answer."""
    only_answer, position = work.is_over, 0
    while True:
        while position < len(work.events):
            event = work.events[position]
            position += 1
            if event is None:
                continue
            if not only_answer or isinstance(event, ImageReady | Done):
                yield event
        if work.is_over:
            break
        async with work.changed:
            while not work.is_over and position == len(work.events):
                await work.changed.wait()
    if work.error is not None:
        raise work.error


async def _announce(work: _Entry) -> None:
    async with work.changed:
        work.changed.notify_all()


def _is_whole(work: _Entry) -> bool:
    return bool(work.events) and isinstance(work.events[-1], Done)


def _stop(work: _Entry) -> None:
    if not work.is_over and work.task is not None:
        work.task.cancel()

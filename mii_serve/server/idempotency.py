"""Answers by idempotency key: the same key is worked on once, and whoever asks again gets the same pictures.

A caller whose connection broke may ask again without knowing whether the first attempt arrived. While the work runs, later
calls join it; for a while afterwards its answer is repeated. Work that failed is forgotten, so that asking again tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from mii_serve.errors import DeadlineExceededError, InvalidRequestError, MiiServeError, RequestCancelledError
from mii_serve.proto.interceptor import IDEMPOTENCY_KEY
from mii_serve.proto.v1 import image_generation_pb2 as pb

KEEP_S = 600.0
MAX_BYTES = 256 * 1024 * 1024
"""Of pictures kept; the oldest answers go first."""
GRACE_S = 10.0
"""Work that nobody waits for goes on for so long, in case its caller comes back."""

Key = tuple[str, str, int | None]
"""Whose key, where API keys tell; the key; which request of its call. One caller cannot see another's pictures by guessing."""
Make = Callable[[], AsyncGenerator[pb.GenerateEvent, None]]


@dataclass(slots=True, eq=False)
class _Work:
    """One run and all that it has said; None where later news of the same kind has replaced it."""

    fingerprint: bytes
    events: list[pb.GenerateEvent | None] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    task: asyncio.Task[None] | None = None
    error: MiiServeError | None = None
    is_over: bool = False
    ended_at: float = 0.0
    num_readers: int = 0
    num_bytes: int = 0


class Answers:
    """What was asked for with a key, running or kept."""

    def __init__(self, *, max_bytes: int = MAX_BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        self._works: OrderedDict[Key, _Work] = OrderedDict()
        self._max_bytes = max_bytes
        self._clock = clock

    async def events(self, key: Key, fingerprint: bytes, make: Make) -> AsyncGenerator[pb.GenerateEvent, None]:
        """The events of the work under this key, made by `make` if this is the first call for it.

        Raises:
            InvalidRequestError: the key was used for another request.
            MiiServeError: what the work ended with.
        """
        self._forget_old()
        while True:
            work = self._works.get(key)
            is_mine = work is None
            if work is None:
                work = self._works[key] = _Work(fingerprint)
                work.task = asyncio.create_task(self._run(key, work, make))
            elif work.fingerprint != fingerprint:
                raise InvalidRequestError(IDEMPOTENCY_KEY, "was used for another request already", repr(key[1]))
            try:
                async with contextlib.aclosing(_joined(work)) as events:
                    async for event in events:
                        yield event
                return
            except (DeadlineExceededError, RequestCancelledError):
                if is_mine:  # else it was the first caller's time that ran out, not ours
                    raise

    async def _run(self, key: Key, work: _Work, make: Make) -> None:
        news: dict[tuple[str, int], int] = {}
        try:
            async with contextlib.aclosing(make()) as events:
                async for event in events:
                    kind = event.WhichOneof("event")
                    if kind in ("step", "queued"):  # a slow or late reader needs the latest only
                        of = kind, event.step.image_index
                        if (old := news.get(of)) is not None:
                            work.events[old] = None
                        news[of] = len(work.events)
                    work.events.append(event)
                    await _announce(work)
        except MiiServeError as error:
            work.error = error
        except asyncio.CancelledError:
            work.error = RequestCancelledError("nobody waited for the pictures any more")
        finally:
            work.error = work.error or (None if _is_whole(work) else MiiServeError("the work broke off"))
            work.is_over, work.ended_at = True, self._clock()
            if work.error is not None:
                del self._works[key]
            else:
                self._works.move_to_end(key)
                work.num_bytes = sum(event.ByteSize() for event in work.events if event is not None)
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


async def _joined(work: _Work) -> AsyncGenerator[pb.GenerateEvent, None]:
    """What `_read` gives; work whose last reader leaves early ends soon."""
    work.num_readers += 1
    try:
        async with contextlib.aclosing(_read(work)) as events:
            async for event in events:
                yield event
    finally:
        work.num_readers -= 1
        if not work.num_readers and not work.is_over:
            asyncio.get_running_loop().call_later(GRACE_S, _stop_if_left, work)


async def _read(work: _Work) -> AsyncGenerator[pb.GenerateEvent, None]:
    """All events so far and to come; of work that is over, only those that make the answer."""
    only_answer, position = work.is_over, 0
    while True:
        while position < len(work.events):
            event = work.events[position]
            position += 1
            if event is None:
                continue
            if not only_answer or event.WhichOneof("event") in ("image", "done"):
                copy = pb.GenerateEvent()
                copy.CopyFrom(event)
                yield copy
        if work.is_over:
            break
        async with work.changed:
            while not work.is_over and position == len(work.events):
                await work.changed.wait()
    if work.error is not None:
        raise work.error


async def _announce(work: _Work) -> None:
    async with work.changed:
        work.changed.notify_all()


def _is_whole(work: _Work) -> bool:
    return bool(work.events) and (last := work.events[-1]) is not None and last.HasField("done")


def _stop_if_left(work: _Work) -> None:
    if not work.num_readers and not work.is_over and work.task is not None:
        work.task.cancel()

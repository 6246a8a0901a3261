"""Work under idempotency keys: who joins, who is given the answer again, what is forgotten, and what is kept how long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

import pytest
from replica_doubles import done_of, image_of, resolved, settle

from mii_serve.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    MiiServeError,
    QueueFullError,
    RequestCancelledError,
    UnavailableError,
)
from mii_serve.server import idempotency
from mii_serve.server.idempotency import IdempotencyCache
from mii_serve.types import Done, Event, ImageReady, Queued, ResolvedRequest, Started, Step

KEY = ("", "k", None)


class FakeRun:
    """One time that the work is done: the test says what happens."""

    def __init__(self, request: ResolvedRequest) -> None:
        self.request = request
        self.is_over = False
        self._events: asyncio.Queue[Event | BaseException] = asyncio.Queue()

    async def events(self) -> AsyncGenerator[Event, None]:
        event: object = None
        try:
            while not isinstance(event, Done):
                event = await self._events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            self.is_over = True

    def put(self, *events: Event | BaseException) -> None:
        for event in events:
            self._events.put_nowait(event)

    def image(self, index: int = 0) -> None:
        self.put(image_of(self.request.params, index))

    def finish(self) -> None:
        for index in range(self.request.params.num_images_per_prompt):
            self.image(index)
        self.put(done_of(self.request.params))


class Cache:
    def __init__(self, **options: object) -> None:
        self.cache = IdempotencyCache(clock=time.monotonic, **options)
        self.runs: list[FakeRun] = []

    def run(self, request: ResolvedRequest) -> AsyncGenerator[Event, None]:
        self.runs.append(FakeRun(request))
        return self.runs[-1].events()


class Reader:
    def __init__(self, cache: Cache, *, key=KEY, fingerprint: bytes = b"f", **params: object) -> None:
        self.events: list[Event] = []
        self.error: MiiServeError | None = None
        self.can_read = asyncio.Event()
        self.can_read.set()
        self._stream = cache.cache.events(key, fingerprint, resolved(**params), cache.run)
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for event in self._stream:
                self.events.append(event)
                await self.can_read.wait()
        except MiiServeError as error:
            self.error = error
        finally:
            await self._stream.aclose()

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def images(self) -> list[tuple[int, int]]:
        return [(event.image_index, event.seed) for event in self.events if isinstance(event, ImageReady)]

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture
async def cache() -> Cache:
    return Cache()


async def made(cache: Cache, **options: object) -> Reader:
    """A reader whose work is done at once, if it is done for it."""
    reader, num_runs = Reader(cache, **options), len(cache.runs)
    await settle()
    for run in cache.runs[num_runs:]:
        run.finish()
    await reader.task
    return reader


class TestOneWork:
    async def test_while_it_runs_others_join_and_see_all_of_it(self, cache):
        first = Reader(cache)
        await settle()
        cache.runs[0].put(Queued(num_samples_ahead=1), Started(image_index=0))
        await settle()
        second = Reader(cache, seed=99)
        await settle()
        cache.runs[0].finish()
        await asyncio.gather(first.task, second.task)
        assert len(cache.runs) == 1 and first.events == second.events
        assert [type(event) for event in first.events] == [Queued, Started, ImageReady, Done]

    async def test_afterwards_its_images_and_end_are_given_again(self, cache):
        first = Reader(cache)
        await settle()
        cache.runs[0].put(Queued(num_samples_ahead=1), Started(image_index=0))
        cache.runs[0].finish()
        await first.task
        again = await made(cache)
        assert len(cache.runs) == 1
        assert again.events == [event for event in first.events if isinstance(event, ImageReady | Done)]

    async def test_the_key_belongs_to_one_request(self, cache):
        await made(cache)
        other = await made(cache, fingerprint=b"other")
        assert isinstance(other.error, InvalidRequestError) and "used for another request" in str(other.error)
        assert len(cache.runs) == 1

    async def test_owners_and_parts_do_not_share_keys(self, cache):
        for key in (("", "k", None), ("key a", "k", None), ("", "k", 0), ("", "k", 1)):
            await made(cache, key=key, fingerprint=repr(key).encode())
        assert len(cache.runs) == 4

    async def test_of_steps_and_positions_the_latest_is_kept(self, cache):
        reader = Reader(cache, num_images_per_prompt=2)
        await settle()
        for step in range(1, 5):
            cache.runs[0].put(Queued(num_samples_ahead=4 - step))
            cache.runs[0].put(*(Step(image_index=index, step=step, num_steps=4) for index in range(2)))
            await settle()
        cache.runs[0].image(0)
        await settle()
        late = Reader(cache, num_images_per_prompt=2)
        await settle()
        assert len(reader.of(Step)) == 8 and len(reader.of(Queued)) == 4
        assert [(event.image_index, event.step) for event in late.of(Step)] == [(0, 4), (1, 4)]
        assert [event.num_samples_ahead for event in late.of(Queued)] == [0]
        cache.runs[0].image(1)
        cache.runs[0].put(done_of(cache.runs[0].request.params))
        await asyncio.gather(reader.task, late.task)
        assert reader.images == late.images

    async def test_a_slow_reader_does_not_hold_a_quick_one(self, cache):
        quick, slow = Reader(cache), Reader(cache)
        slow.can_read.clear()
        await settle()
        for step in range(1, 5):
            cache.runs[0].put(Step(image_index=0, step=step, num_steps=4))
            await settle()
        cache.runs[0].finish()
        await quick.task
        assert len(quick.of(Step)) == 4 and len(slow.events) == 1
        slow.can_read.set()
        await slow.task
        assert slow.images == quick.images and slow.of(Step)[-1].step == 4


class TestFailures:
    @pytest.mark.parametrize("error", [QueueFullError("full", 1.0), MiiServeError("broken")])
    async def test_all_who_wait_are_told_and_the_next_one_runs_anew(self, cache, error):
        readers = [Reader(cache) for _ in range(2)]
        await settle()
        cache.runs[0].put(error)
        await asyncio.gather(*(reader.task for reader in readers))
        assert [reader.error for reader in readers] == [error] * 2
        assert (await made(cache)).error is None and len(cache.runs) == 2

    async def test_a_defect_is_logged_and_told(self, cache, caplog):
        reader = Reader(cache)
        await settle()
        cache.runs[0].put(KeyError("a defect"))
        await reader.task
        assert type(reader.error) is MiiServeError and "a defect" in caplog.text
        assert (await made(cache)).error is None

    @pytest.mark.parametrize("error", [DeadlineExceededError("late"), RequestCancelledError("left")])
    async def test_the_first_callers_end_is_not_that_of_the_others(self, cache, error):
        first, second, third = (Reader(cache) for _ in range(3))
        await settle()
        cache.runs[0].put(error)
        await first.task
        await settle()
        assert first.error is error and len(cache.runs) == 2, "the others go on together"
        cache.runs[1].finish()
        await asyncio.gather(second.task, third.task)
        assert second.images == third.images == [(0, 5)]

    async def test_who_goes_on_gets_each_image_once_and_all_of_one_seed(self, cache):
        """The caller named no seed, so that each call has drawn another one."""
        first, second = (Reader(cache, num_images_per_prompt=2, seed=seed) for seed in (100, 200))
        await settle()
        cache.runs[0].image(0)
        await settle()
        cache.runs[0].put(DeadlineExceededError("late"))
        await settle()
        assert cache.runs[1].request.params.seed == 100
        cache.runs[1].finish()
        await asyncio.gather(first.task, second.task)
        assert second.images == [(0, 100), (1, 101)] and isinstance(second.events[-1], Done)

    async def test_who_has_images_of_another_seed_is_told_to_ask_again(self, cache):
        first, second = (Reader(cache, num_images_per_prompt=2, seed=seed) for seed in (100, 200))
        await settle()
        cache.runs[0].image(0)
        await settle()
        second.can_read.clear()
        cache.runs[0].image(1)
        await settle()
        cache.runs[0].put(DeadlineExceededError("late"))
        await settle()
        third = Reader(cache, num_images_per_prompt=2, seed=300)
        await settle()
        second.can_read.set()
        await second.task
        assert isinstance(second.error, UnavailableError) and second.images == [(0, 100), (1, 101)]
        cache.runs[1].finish()
        await asyncio.gather(first.task, third.task)
        assert third.images == [(0, 300), (1, 301)]


class TestReadersWhoLeave:
    async def test_the_work_goes_on_for_a_while_and_whoever_comes_back_joins_it(self, cache):
        first = Reader(cache)
        await settle()
        await first.leave()
        await asyncio.sleep(idempotency.GRACE_S - 1)
        second = Reader(cache)
        await asyncio.sleep(10 * idempotency.GRACE_S)
        assert not cache.runs[0].is_over
        cache.runs[0].finish()
        await second.task
        assert second.images and len(cache.runs) == 1

    async def test_then_it_ends_and_is_forgotten(self, cache):
        reader = Reader(cache)
        await settle()
        await reader.leave()
        await asyncio.sleep(idempotency.GRACE_S + 1)
        assert cache.runs[0].is_over and not cache.cache._works
        assert (await made(cache)).error is None and len(cache.runs) == 2

    async def test_every_leaving_starts_the_time_anew(self, cache):
        for _ in range(5):
            reader = Reader(cache)
            await asyncio.sleep(0.7 * idempotency.GRACE_S)
            await reader.leave()
            await asyncio.sleep(0.7 * idempotency.GRACE_S)
            assert not cache.runs[0].is_over
        await asyncio.sleep(0.4 * idempotency.GRACE_S)
        assert cache.runs[0].is_over and len(cache.runs) == 1

    async def test_one_of_several_who_leaves_ends_nothing(self, cache):
        stays, leaves = Reader(cache), Reader(cache)
        await settle()
        await leaves.leave()
        await asyncio.sleep(5 * idempotency.GRACE_S)
        cache.runs[0].finish()
        await stays.task
        assert stays.images

    async def test_work_that_ends_while_nobody_reads_is_kept(self, cache):
        reader = Reader(cache)
        await settle()
        await reader.leave()
        cache.runs[0].finish()
        await asyncio.sleep(5 * idempotency.GRACE_S)
        assert (await made(cache)).images and len(cache.runs) == 1


class TestBounds:
    async def test_in_bytes_the_oldest_goes_first(self):
        size = len(image_of(resolved().params, 0).encoded)
        cache = Cache(max_bytes=2 * size)
        for name in "abab":
            await made(cache, key=("", name, None))
        assert len(cache.runs) == 2
        await made(cache, key=("", "c", None))
        await made(cache, key=("", "b", None))
        assert len(cache.runs) == 3, "b is still there"
        await made(cache, key=("", "a", None))
        assert len(cache.runs) == 4

    async def test_the_oldest_is_the_one_that_ended_first(self):
        cache = Cache(max_bytes=2 * len(image_of(resolved().params, 0).encoded))
        first = Reader(cache, key=("", "a", None))
        await settle()
        await made(cache, key=("", "b", None))
        cache.runs[0].finish()
        await first.task
        await made(cache, key=("", "c", None))
        assert [key for _, key, _ in cache.cache._works] == ["a", "c"]

    async def test_an_answer_that_is_too_large_is_given_and_not_kept(self):
        cache = Cache(max_bytes=1)
        reader = await made(cache)
        assert reader.images and not cache.cache._works

    async def test_in_time(self, cache):
        await made(cache)
        await asyncio.sleep(idempotency.KEEP_S - 1)
        await made(cache)
        assert len(cache.runs) == 1
        await asyncio.sleep(2)
        await made(cache)
        assert len(cache.runs) == 2

    async def test_the_time_counts_from_the_end(self, cache):
        reader = Reader(cache)
        await asyncio.sleep(2 * idempotency.KEEP_S)
        cache.runs[0].finish()
        await reader.task
        await made(cache)
        assert len(cache.runs) == 1

    async def test_what_runs_is_not_forgotten(self):
        cache = Cache(max_bytes=1)
        reader = Reader(cache)
        await asyncio.sleep(2 * idempotency.KEEP_S)
        await made(cache, key=("", "other", None))
        joined = Reader(cache)
        await settle()
        cache.runs[0].finish()
        await asyncio.gather(reader.task, joined.task)
        assert len(cache.runs) == 2

"""The replica's side of a front's stream, with a loop in memory: what one report holds, and what ends with the orders."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
from fake_engine import FakeEngine
from replica_doubles import done_of, image_of, resolved, settle

from mii_serve.errors import EngineLostError, InvalidRequestError, MiiServeError, QueueFullError
from mii_serve.proto.codec import decode_event, encode_request
from mii_serve.proto.replica import replica_pb2 as pb
from mii_serve.proto.status import error_of
from mii_serve.replica import service
from mii_serve.replica.loop import Outlet
from mii_serve.replica.service import ReplicaService, _Front
from mii_serve.types import Done, Event, ImageFormat, ImageReady, Preview, Queued, ResolvedRequest, Started, Step


class FakeLoop:
    """What a front's stream uses of a `ReplicaLoop`."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.submitted: dict[str, tuple[ResolvedRequest, dict[str, object]]] = {}
        self.outlets: list[Outlet] = []
        self.dropped: list[str] = []
        self.error: Exception | None = None
        self.may_accept = asyncio.Event()
        self.may_accept.set()

    async def submit(self, request_id: str, resolved: ResolvedRequest, outlet: Outlet, **options: object) -> None:
        self.submitted[request_id] = resolved, options
        await self.may_accept.wait()
        if self.error is not None:
            raise self.error
        self.outlets.append(outlet)

    def drop(self, request_id: str) -> None:
        self.dropped.append(request_id)


class Stream:
    """A front's orders, and the reports it is sent."""

    def __init__(self, loop: FakeLoop) -> None:
        self.loop = loop
        self.front = _Front(loop)
        self._orders: asyncio.Queue[pb.Order | None] = asyncio.Queue()
        self.reading = asyncio.create_task(self.front.follow(self._each()))

    async def _each(self) -> AsyncIterator[pb.Order]:
        while (order := await self._orders.get()) is not None:
            yield order

    async def order(self, *numbers: int, **options: object) -> None:
        for number in numbers:
            generate = pb.Generate(id=number, request=encode_request(resolved()), request_id="r", client="c", **options)
            self._orders.put_nowait(pb.Order(generate=generate))
        await settle()

    async def cancel(self, number: int) -> None:
        self._orders.put_nowait(pb.Order(cancel=pb.Cancel(id=number)))
        await settle()

    async def end(self) -> None:
        self._orders.put_nowait(None)
        await settle()

    async def report(self) -> pb.Report:
        report = await self.front.next_report(self.reading)
        assert report is not None
        return report

    @property
    def has_report(self) -> bool:
        return self.front._changed.is_set()


@pytest.fixture
async def loop() -> FakeLoop:
    return FakeLoop()


@pytest.fixture
async def stream(loop: FakeLoop) -> AsyncIterator[Stream]:
    opened = Stream(loop)
    yield opened
    opened.reading.cancel()
    await asyncio.gather(opened.reading, return_exceptions=True)
    opened.front.drop_all()


def events(news: Iterator[pb.News]) -> list[tuple[int, Event | MiiServeError]]:
    from google.rpc import status_pb2

    return [
        (one.id, decode_event(one.event) if one.HasField("event") else error_of(status_pb2.Status.FromString(one.error)))
        for one in news
    ]


def step(index: int, made: int) -> Step:
    return Step(image_index=index, step=made, num_steps=4, estimated_left_s=0.5)


def preview(index: int, made: int) -> Preview:
    return Preview(image_index=index, step=made, encoded=b"p", format=ImageFormat.PNG, height=8, width=8)


IMAGE, DONE = image_of(resolved().params, 0), done_of(resolved().params)


class TestOrders:
    async def test_they_are_submitted_with_all_that_they_say(self, loop, stream):
        await stream.order(1, timeout_s=2.5, traceparent="t")
        await stream.order(2)
        (first, with_all), (_, with_none) = loop.submitted.values()
        assert first == resolved()
        assert with_all == {"client": "c", "timeout_s": 2.5, "traceparent": "t"}
        assert with_none == {"client": "c", "timeout_s": None, "traceparent": None}

    async def test_several_of_one_request_id_have_ids_of_their_own_in_the_loop(self, loop, stream):
        await stream.order(1, 2, 3)
        assert len(loop.submitted) == 3 and {name.partition(" ")[0] for name in loop.submitted} == {"r"}

    async def test_a_cancel_drops_its_own(self, loop, stream):
        await stream.order(1, 2)
        await stream.cancel(1)
        await stream.cancel(77)
        assert loop.dropped == list(loop.submitted)[:1]

    async def test_a_cancel_that_comes_before_the_acceptance(self, loop, stream):
        loop.may_accept.clear()
        await stream.order(1)
        await stream.cancel(1)
        loop.may_accept.set()
        await settle()
        assert not loop.outlets and loop.dropped == list(loop.submitted) and not stream.has_report

    async def test_the_end_of_the_orders_is_the_end_of_the_reports_and_drops_all(self, loop, stream):
        await stream.order(1, 2)
        loop.may_accept.clear()
        await stream.order(3)
        await stream.end()
        assert await stream.front.next_report(stream.reading) is None
        stream.front.drop_all()
        await settle()
        assert sorted(loop.dropped) == sorted(loop.submitted)
        assert not stream.front._running and not stream.front._accepting

    @pytest.mark.parametrize(
        ("error", "told"),
        [
            (QueueFullError("full", 1.0), QueueFullError),
            (InvalidRequestError("scheduler", "is wrong"), InvalidRequestError),
            (KeyError("a secret"), MiiServeError),
        ],
    )
    async def test_an_order_that_is_not_accepted_has_an_error(self, loop, stream, error, told, caplog):
        loop.error = error
        await stream.order(7)
        [(number, answer)] = events((await stream.report()).after_steps)
        assert number == 7 and isinstance(answer, told) and "secret" not in str(answer)
        assert ("a secret" in caplog.text) == isinstance(error, KeyError)
        assert not stream.front._running and not stream.front._accepting


class TestReports:
    async def test_all_of_a_turn_is_one_report(self, loop, stream):
        await stream.order(1, 2, 3)
        waiting = asyncio.create_task(stream.report())
        await settle()
        for made, outlet in enumerate(loop.outlets, 1):
            outlet.put(Queued(num_samples_ahead=0))
            outlet.put(Started(image_index=0))
            outlet.put(step(0, made))
        loop.outlets[2].put(IMAGE)
        loop.outlets[2].put(DONE)
        report = await waiting
        before = events(report.before_steps)
        assert [number for number, _ in before] == [1, 1, 2, 2, 3, 3]
        assert [type(event) for _, event in before] == [Queued, Started] * 3
        columns = report.steps
        assert list(zip(columns.id, columns.image_index, columns.step, columns.num_steps, strict=True)) == [
            (1, 0, 1, 4),
            (2, 0, 2, 4),
            (3, 0, 3, 4),
        ]
        assert list(columns.estimated_left_s) == [0.5] * 3
        assert events(report.after_steps) == [(3, IMAGE), (3, DONE)]
        assert not stream.has_report

    async def test_steps_that_no_caller_reads_wait_for_other_news_or_a_quarter_of_a_second(self, loop, stream, monkeypatch):
        now = [100.0]
        monkeypatch.setattr(service.time, "monotonic", lambda: now[0])
        await stream.order(1, 2)
        for outlet in loop.outlets:
            outlet.put(step(0, 1))
        assert list((await stream.report()).steps.step) == [1, 1], "the first after a pause is sent at once"
        loop.outlets[0].put(step(0, 2))
        assert not stream.has_report
        loop.outlets[1].put(Started(image_index=0))
        assert list((await stream.report()).steps.step) == [2], "with what is sent anyway"
        loop.outlets[0].put(step(0, 3))
        assert not stream.has_report
        now[0] += service.STEPS_EVERY_S
        loop.outlets[1].put(step(0, 2))
        assert list((await stream.report()).steps.step) == [3, 2]

    async def test_steps_that_a_caller_reads_are_sent_at_once_until_the_request_ends(self, loop, stream):
        await stream.order(1, has_steps=True)
        await stream.order(2)
        for made in range(1, 4):
            for outlet in loop.outlets:
                outlet.put(step(0, made))
            assert stream.has_report
            assert list((await stream.report()).steps.step) == [made, made]
        loop.outlets[0].put(DONE)
        await stream.report()
        assert not stream.front._wanting_steps

    async def test_a_front_that_is_slow_is_sent_the_latest(self, loop, stream):
        await stream.order(1)
        [outlet] = loop.outlets
        for made in range(1, 5):
            outlet.put(Queued(num_samples_ahead=4 - made))
            for index in range(2):
                outlet.put(step(index, made))
                outlet.put(preview(index, made))
        report = await stream.report()
        assert events(report.before_steps) == [(1, Queued(num_samples_ahead=0))]
        assert list(report.steps.step) == [4, 4]
        assert events(report.after_steps) == [(1, preview(0, 4)), (1, preview(1, 4))]

    async def test_starts_are_all_kept_and_in_their_order(self, loop, stream):
        await stream.order(1)
        [outlet] = loop.outlets
        for event in (Queued(num_samples_ahead=1), Started(image_index=0), Queued(num_samples_ahead=0), Started(image_index=1)):
            outlet.put(event)
        told = [event for _, event in events((await stream.report()).before_steps)]
        assert told == [Started(image_index=0), Queued(num_samples_ahead=0), Started(image_index=1)]

    async def test_an_image_comes_after_its_previews_and_the_end_after_its_images(self, loop, stream):
        await stream.order(1)
        [outlet] = loop.outlets
        for event in (preview(0, 3), IMAGE, DONE):
            outlet.put(event)
        assert [type(event) for _, event in events((await stream.report()).after_steps)] == [Preview, ImageReady, Done]

    async def test_images_beyond_the_bound_wait_for_the_next_report(self, loop, stream, monkeypatch):
        await stream.order(1)
        [outlet] = loop.outlets
        images = [image_of(resolved(num_images_per_prompt=5).params, index) for index in range(5)]
        for image in images:
            outlet.put(image)
        outlet.put(DONE)
        monkeypatch.setattr(service, "MAX_REPORT_BYTES", 2 * len(image_of(resolved().params, 0).encoded))
        told, reports = [], 0
        while stream.has_report:
            told += [event for _, event in events((await stream.report()).after_steps)]
            reports += 1
        assert told == [*images, DONE] and reports >= 3

    async def test_one_image_that_is_larger_than_the_bound_goes_alone(self, loop, stream, monkeypatch):
        monkeypatch.setattr(service, "MAX_REPORT_BYTES", 1)
        await stream.order(1)
        for event in (IMAGE, DONE):
            loop.outlets[0].put(event)
        assert [type(event) for _, event in events((await stream.report()).after_steps)] == [ImageReady]
        assert [type(event) for _, event in events((await stream.report()).after_steps)] == [Done]

    @pytest.mark.parametrize("end", [DONE, EngineLostError("the engine failed"), KeyError("a defect")])
    async def test_of_one_that_has_ended_nothing_is_kept(self, loop, stream, end):
        await stream.order(1)
        loop.outlets[0].put(end)
        [(number, answer)] = events((await stream.report()).after_steps)
        assert number == 1 and isinstance(answer, type(end) if isinstance(end, Done | EngineLostError) else MiiServeError)
        assert not stream.front._running
        stream.front.drop_all()
        assert not loop.dropped


class FakeContext:
    """Writes to a front that may be gone."""

    def __init__(self, error: Exception | None = None) -> None:
        self.written: list[pb.Report] = []
        self._error = error

    async def write(self, report: pb.Report) -> None:
        if self._error is not None:
            raise self._error
        self.written.append(report)


class TestCall:
    """The whole call, as gRPC runs it."""

    @pytest.fixture
    def call(self, loop):
        replica = ReplicaService.__new__(ReplicaService)
        replica._loop = loop
        return replica.Work

    async def orders(self, *numbers: int) -> AsyncIterator[pb.Order]:
        for number in numbers:
            yield pb.Order(generate=pb.Generate(id=number, request=encode_request(resolved()), request_id="r"))
        await asyncio.Event().wait()

    async def test_reports_are_written_until_it_is_cancelled_and_then_all_is_dropped(self, loop, call):
        context = FakeContext()
        working = asyncio.create_task(call(self.orders(1, 2), context))
        await settle()
        for outlet in loop.outlets:
            outlet.put(step(0, 1))
        await settle()
        assert [list(report.steps.id) for report in context.written] == [[1, 2]]
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        assert loop.dropped == list(loop.submitted) and asyncio.all_tasks() == {asyncio.current_task()}

    async def test_a_front_that_has_gone_is_no_error(self, loop, call):
        working = asyncio.create_task(call(self.orders(1), FakeContext(grpc.aio.UsageError("RPC already finished."))))
        await settle()
        loop.outlets[0].put(step(0, 1))
        await working
        assert loop.dropped == list(loop.submitted)

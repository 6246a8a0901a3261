"""The front's side of a replica's stream, without a socket: the test plays the replica's stub."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from replica_doubles import done_of, image_of, resolved, settle

from mii_serve.errors import (
    DeadlineExceededError,
    EngineError,
    EngineLostError,
    InvalidRequestError,
    MiiServeError,
    UnavailableError,
)
from mii_serve.proto.codec import decode_resolved, encode_event
from mii_serve.proto.replica import replica_pb2 as pb
from mii_serve.proto.status import status_of
from mii_serve.proto.v1.image_generation_pb2 import GetServerInfoResponse
from mii_serve.server import replica_client
from mii_serve.server.replica_client import Loss, Order, ReplicaClient, ReplicaConnection, ReplicaLostError
from mii_serve.types import Done, Event, ImageReady, Queued, Started, Step

BROKEN = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "broken pipe")


class FakeCall:
    """One stream: what the front has ordered, and the reports that the test feeds."""

    def __init__(self, orders: AsyncIterator[pb.Order], metadata: object) -> None:
        self.metadata = metadata
        self.orders: list[pb.Order] = []
        self.is_cancelled = False
        self._reports: asyncio.Queue[pb.Report | BaseException | None] = asyncio.Queue()
        self._taking = asyncio.create_task(self._take(orders))

    async def _take(self, orders: AsyncIterator[pb.Order]) -> None:
        async for order in orders:
            self.orders.append(order)

    def __aiter__(self) -> FakeCall:
        return self

    async def __anext__(self) -> pb.Report:
        match await self._reports.get():
            case pb.Report() as report:
                return report
            case None:
                raise StopAsyncIteration
            case error:
                raise error

    def feed(self, report: pb.Report | BaseException | None) -> None:
        self._reports.put_nowait(report)

    def cancel(self) -> None:
        self.is_cancelled = True
        self._taking.cancel()

    @property
    def generates(self) -> list[pb.Generate]:
        return [order.generate for order in self.orders if order.HasField("generate")]

    @property
    def cancelled_ids(self) -> list[int]:
        return [order.cancel.id for order in self.orders if order.HasField("cancel")]


class FakeChannel:
    """A channel of which the replica's stub is made; and the address that gives it."""

    metadata = (("authorization", "Bearer t"),)

    def __init__(self) -> None:
        self.calls: list[FakeCall] = []
        self.answers_info = True
        self.num_asked = 0
        self.is_closed = False

    def channel(self) -> FakeChannel:
        return self

    def stream_stream(self, path: str, **_: object):
        def work(orders: AsyncIterator[pb.Order], metadata: object = None) -> FakeCall:
            if self.is_closed:
                raise grpc.aio.UsageError("Channel is closed.")
            self.calls.append(FakeCall(orders, metadata))
            return self.calls[-1]

        return work

    def unary_unary(self, path: str, **_: object):
        async def ask(request: object, **options: object) -> object:
            self.num_asked += 1
            if not self.answers_info:
                raise BROKEN
            return pb.Metrics(text=b"text") if path.endswith("GetMetrics") else GetServerInfoResponse()

        return ask

    async def close(self) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def plain_info(monkeypatch):
    monkeypatch.setattr(replica_client, "decode_server_info", lambda answer: answer)


@pytest.fixture
async def channel() -> FakeChannel:
    return FakeChannel()


@pytest.fixture
async def connection(channel: FakeChannel) -> AsyncIterator[ReplicaConnection]:
    opened = ReplicaConnection(channel)
    yield opened
    await opened.close()


class Reader:
    """A reader of an order's events."""

    def __init__(
        self, connection: ReplicaConnection, *, left_s: float | None = None, has_steps: bool = True, **params: object
    ) -> None:
        self.steps: list[tuple[int, int, int]] = []
        self.events: list[Event] = []
        self.error: Exception | None = None
        order = Order(
            request_id="r",
            request=resolved(**params),
            client="c",
            left_s=left_s,
            traceparent=None,
            has_steps=has_steps,
            on_step=lambda *step: self.steps.append(step),
        )
        connection.num_running += 1  # as the router does
        self._connection = connection
        self._stream = connection.generate(order)
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for event in self._stream:
                self.events.append(event)
        except Exception as error:  # noqa: BLE001 - what tests look at
            self.error = error
        finally:
            await self._stream.aclose()
            self._connection.num_running -= 1

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def news(number: int, entry: Event | MiiServeError) -> pb.News:
    if isinstance(entry, MiiServeError):
        return pb.News(id=number, error=status_of(entry).SerializeToString())
    return pb.News(id=number, event=encode_event("", entry))


def steps(*rows: tuple[int, int, int, int]) -> pb.Steps:
    numbers, indexes, made, of = zip(*rows, strict=True)
    return pb.Steps(id=numbers, image_index=indexes, step=made, num_steps=of, estimated_left_s=[0.5] * len(rows))


def ending(number: int) -> pb.Report:
    params = resolved().params
    return pb.Report(after_steps=[news(number, image_of(params, 0)), news(number, done_of(params))])


class TestOrders:
    async def test_an_order_goes_out_as_it_is(self, channel, connection):
        reader = Reader(connection, left_s=7.5, num_images_per_prompt=3)
        await settle()
        [call] = channel.calls
        [order] = call.generates
        assert (order.id, order.request_id, order.client, order.timeout_s, order.traceparent) == (1, "r", "c", 7.5, "")
        assert decode_resolved(order.request) == resolved(num_images_per_prompt=3)
        assert call.metadata == channel.metadata
        await reader.leave()

    async def test_all_orders_go_over_one_stream_each_with_a_number_of_its_own(self, channel, connection):
        readers = [Reader(connection) for _ in range(3)]
        await settle()
        [call] = channel.calls
        assert [order.id for order in call.generates] == [1, 2, 3]
        assert not any(order.HasField("timeout_s") for order in call.generates)
        for reader in readers:
            await reader.leave()

    async def test_leaving_cancels_on_the_replica(self, channel, connection):
        readers = [Reader(connection) for _ in range(2)]
        await settle()
        await readers[1].leave()
        await settle()
        assert channel.calls[0].cancelled_ids == [2] and list(connection._running) == [1]
        await readers[0].leave()

    async def test_one_that_has_ended_is_not_cancelled(self, channel, connection):
        reader, refused = Reader(connection), Reader(connection)
        await settle()
        channel.calls[0].feed(ending(1))
        channel.calls[0].feed(pb.Report(after_steps=[news(2, InvalidRequestError("scheduler", "is wrong"))]))
        await asyncio.gather(reader.task, refused.task)
        await settle()
        assert not channel.calls[0].cancelled_ids and not connection._running


class TestReports:
    async def test_the_parts_of_a_report_are_events_in_their_order(self, channel, connection):
        reader = Reader(connection)
        await settle()
        channel.calls[0].feed(
            pb.Report(
                before_steps=[news(1, Queued(num_samples_ahead=2)), news(1, Started(image_index=0))],
                steps=steps((1, 0, 4, 4)),
                after_steps=ending(1).after_steps,
            )
        )
        await reader.task
        assert [type(event) for event in reader.events] == [Queued, Started, Step, ImageReady, Done]
        assert reader.events[2] == Step(image_index=0, step=4, num_steps=4, estimated_left_s=0.5)
        assert reader.events[3] == image_of(resolved().params, 0)

    async def test_steps_are_told_to_all_and_are_events_for_those_who_want_them(self, channel, connection):
        wants, wants_not = Reader(connection), Reader(connection, has_steps=False)
        await settle()
        assert [order.has_steps for order in channel.calls[0].generates] == [True, False]
        channel.calls[0].feed(pb.Report(steps=steps((1, 0, 2, 4), (2, 0, 3, 4), (2, 1, 1, 4))))
        await settle()
        assert (wants.steps, wants_not.steps) == ([(0, 2, 4)], [(0, 3, 4), (1, 1, 4)])
        assert [event.step for event in wants.events] == [2] and wants_not.events == []
        for reader in (wants, wants_not):
            await reader.leave()

    async def test_news_of_those_who_have_left_are_passed_over(self, channel, connection):
        left, stays = Reader(connection), Reader(connection)
        await settle()
        await left.leave()
        channel.calls[0].feed(
            pb.Report(
                before_steps=[news(1, Started(image_index=0)), news(99, Started(image_index=0))],
                steps=steps((1, 0, 1, 4), (2, 0, 1, 4)),
                after_steps=[news(1, EngineLostError("late")), *ending(2).after_steps],
            )
        )
        await stays.task
        assert stays.error is None and not left.steps and not connection.is_broken

    @pytest.mark.parametrize("error", [InvalidRequestError("scheduler", "is wrong"), EngineError("too large")])
    async def test_an_error_ends_its_request_only(self, channel, connection, error):
        refused, other = Reader(connection), Reader(connection)
        await settle()
        channel.calls[0].feed(pb.Report(after_steps=[news(1, error)]))
        await refused.task
        assert (type(refused.error), str(refused.error)) == (type(error), str(error))
        assert not connection.is_broken and not other.task.done()
        await other.leave()

    async def test_a_slow_reader_finds_the_latest_step(self, channel, connection):
        order = Order(
            request_id="r",
            request=resolved(),
            client="c",
            left_s=None,
            traceparent=None,
            has_steps=True,
            on_step=lambda *_: None,
        )
        stream = connection.generate(order)
        first = asyncio.create_task(anext(stream))
        await settle()
        for step in range(1, 5):
            channel.calls[0].feed(pb.Report(steps=steps((1, 0, step, 4))))
        channel.calls[0].feed(ending(1))
        events = [await first]
        await settle()
        events += [event async for event in stream]
        assert len([event for event in events if isinstance(event, Step)]) <= 2
        assert [event.step for event in events if isinstance(event, Step)][-1] == 4


class TestLosses:
    @pytest.mark.parametrize("error", [EngineLostError("the engine failed"), UnavailableError("the replica is stopping")])
    async def test_a_replica_that_says_that_it_ends_is_lost(self, channel, connection, error):
        reader, other = Reader(connection), Reader(connection)
        await settle()
        channel.calls[0].feed(pb.Report(after_steps=[news(1, error)]))
        await reader.task
        assert isinstance(reader.error, ReplicaLostError) and not reader.error.was_alone
        assert connection.is_broken and connection.num_running_at_break == 2
        await other.leave()

    @pytest.mark.parametrize("end", [BROKEN, None, grpc.aio.UsageError("Channel is closed."), asyncio.CancelledError()])
    @pytest.mark.parametrize("num_running", [1, 3])
    async def test_when_its_stream_ends_all_that_runs_is_lost(self, channel, connection, end, num_running):
        """However it ends; grpc reports a channel that is closed as a cancellation."""
        readers = [Reader(connection) for _ in range(num_running)]
        await settle()
        channel.calls[0].feed(end)
        await asyncio.gather(*(reader.task for reader in readers))
        for reader in readers:
            assert isinstance(reader.error, ReplicaLostError) and reader.error.was_alone == (num_running == 1)
        assert connection.is_broken and connection.num_running_at_break == num_running
        assert channel.calls[0].is_cancelled and not connection._running

    async def test_a_report_that_cannot_be_read_is_a_break(self, channel, connection, caplog):
        reader = Reader(connection)
        await settle()
        channel.calls[0].feed(pb.Report(steps=pb.Steps(id=[1], image_index=[0], step=[])))
        await reader.task
        assert isinstance(reader.error, ReplicaLostError) and "could not be read" in caplog.text

    async def test_who_comes_after_a_break_opens_a_new_stream(self, channel, connection):
        first = Reader(connection)
        await settle()
        channel.calls[0].feed(BROKEN)
        await first.task
        second = Reader(connection)
        await settle()
        assert [[order.id for order in call.generates] for call in channel.calls] == [[1], [2]]
        channel.calls[1].feed(ending(2))
        await second.task
        assert second.error is None and second.events

    async def test_a_closed_channel_is_a_lost_replica(self, channel, connection):
        await connection.close()
        reader = Reader(connection)
        await reader.task
        assert isinstance(reader.error, ReplicaLostError)

    async def test_closing_ends_what_runs_and_leaves_no_task(self, channel, connection):
        reader = Reader(connection)
        await settle()
        await connection.close()
        await reader.task
        assert isinstance(reader.error, ReplicaLostError) and connection.num_running_at_break == 1
        assert asyncio.all_tasks() - {asyncio.current_task()} == set()


class TestDeadlines:
    async def test_the_front_has_a_clock_of_its_own(self, channel, connection):
        reader = Reader(connection, left_s=3.0)
        await reader.task
        await settle()
        assert isinstance(reader.error, DeadlineExceededError)
        assert asyncio.get_running_loop().time() == pytest.approx(3.0)
        assert channel.calls[0].cancelled_ids == [1] and not connection._running

    async def test_one_that_ends_in_time_leaves_no_timer(self, channel, connection):
        reader = Reader(connection, left_s=3.0)
        await settle()
        channel.calls[0].feed(ending(1))
        await reader.task
        assert reader.error is None
        assert isinstance(reader.events[-1], Done)
        assert all(timer.cancelled() for timer in asyncio.get_running_loop()._scheduled)


class TestRecovery:
    async def test_a_replica_whose_stream_broke_with_nothing_on_it_takes_work_again(self, channel):
        num_recoveries: list[int] = []
        connection = ReplicaConnection(channel, lambda: num_recoveries.append(1))
        reader = Reader(connection)
        await settle()
        channel.calls[0].feed(ending(1))
        await reader.task
        channel.calls[0].feed(BROKEN)
        await settle()
        assert connection.is_broken and connection.num_running_at_break == 0
        await asyncio.sleep(replica_client.PROBE_EVERY_S + 1)
        assert not connection.is_broken and connection.num_running_at_break is None and num_recoveries == [1]
        await connection.close()

    async def test_one_that_does_not_answer_is_asked_again_and_again(self, channel, connection):
        channel.answers_info = False
        connection.note_break()
        await asyncio.sleep(5 * replica_client.PROBE_EVERY_S + 1)
        assert connection.is_broken and channel.num_asked == 5
        channel.answers_info = True
        await asyncio.sleep(replica_client.PROBE_EVERY_S)
        assert not connection.is_broken

    async def test_one_that_is_known_to_be_lost_is_not_asked(self, channel, connection):
        connection.note_break()
        connection.lost.set_result(Loss(reason="killed by signal 9", is_crash=False))
        await asyncio.sleep(100.0)
        assert connection.is_broken and not channel.num_asked

    async def test_several_breaks_are_one_until_it_recovers(self, channel, connection):
        connection.num_running = 4
        connection.note_break()
        connection.num_running = 1
        connection.note_break()
        assert connection.num_running_at_break == 4
        await asyncio.sleep(replica_client.PROBE_EVERY_S + 1)
        assert channel.num_asked == 1
        connection.note_break()
        assert connection.num_running_at_break == 1


class TestClient:
    async def test_it_is_up_between_attach_and_the_first_sign_of_loss(self, channel):
        client = ReplicaClient(0)
        assert not client.is_up and await client.info(1.0) is None and await client.metrics(1.0) is None
        await client.attach(channel)
        assert client.is_up and await client.metrics(1.0) == b"text"
        client.connection.note_break()
        assert not client.is_up and client.connection is None
        await client.detach(Loss(reason="killed", is_crash=False))

    async def test_detaching_tells_those_who_wait_to_know_why(self, channel):
        client = ReplicaClient(0)
        await client.attach(channel)
        lost, loss = client.connection.lost, Loss(reason="killed", is_crash=False)
        await client.detach(loss)
        assert lost.result() is loss and channel.is_closed
        await client.detach(loss)

    async def test_a_new_life_starts_without_what_was_known_of_the_old_one(self, channel):
        client = ReplicaClient(0)
        await client.attach(channel)
        old = client.connection
        old.work = 5
        await client.attach(FakeChannel())
        old.note_break()
        assert client.is_up and client.work == client.num_running == 0
        assert old.lost.result().reason == "it was replaced"
        await client.detach(Loss(reason="killed", is_crash=False))

    async def test_one_that_does_not_answer_is_not_attached(self, channel):
        client, channel.answers_info = ReplicaClient(0), False
        with pytest.raises(grpc.aio.AioRpcError):
            await client.attach(channel)
        assert not client.is_up and channel.is_closed

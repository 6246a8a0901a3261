"""Open and closed loops, on a clock that is not the wall's."""

from __future__ import annotations

import asyncio
from itertools import islice

import pytest
from virtual_time import run

from mii_serve.bench.arrivals import constant
from mii_serve.bench.load import LoadLimits, closed_loop, open_loop
from mii_serve.bench.mix import parse_mix
from mii_serve.bench.summary import summary
from mii_serve.bench.values import Answer, ReceivedPicture

PIXEL = ReceivedPicture(encoded=bytes(3), raw_size=(1, 1))
MIX = parse_mix("1: num_inference_steps=1")


def request(index: int):
    return MIX.request("0", index)


def scheduled(rate: float, seconds: float):
    for index, arrival in enumerate(constant(rate)):
        if arrival.at_s >= seconds:
            return
        yield arrival.at_s, request(index)


class OneAtATime:
    """Takes `service_s` for each request, in order; from `stall_at` to `stall_until` it does nothing."""

    def __init__(self, service_s: float, stall_at: float = 1e9, stall_until: float = 0.0) -> None:
        self.service_s, self.stall_at, self.stall_until = service_s, stall_at, stall_until
        self.lock = asyncio.Lock()
        self.under_way = self.most_under_way = 0

    async def ask(self, request, timeout_s: float) -> Answer:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            async with asyncio.timeout(timeout_s), self.lock:
                now = asyncio.get_running_loop().time()
                await asyncio.sleep(self.stall_until - now if self.stall_at <= now < self.stall_until else 0)
                await asyncio.sleep(self.service_s)
                return Answer(code="OK", pictures=(PIXEL,))
        except TimeoutError:
            return Answer(code="DEADLINE_EXCEEDED")
        finally:
            self.under_way -= 1

    async def close(self) -> None: ...


def test_a_stall_is_counted_for_everybody_who_had_to_wait_behind_it():
    """With one request under way at a time, only one is sent into the stall: timed from sending, it hardly shows."""
    server = OneAtATime(0.010, stall_at=1.0, stall_until=3.0)
    records = run(open_loop(server, scheduled(20, 5), LoadLimits(max_in_flight=1)))
    figures = summary(records, target_s=None)
    assert figures["num_ok"] == 100
    assert figures["from_sent_s"]["p95"] == pytest.approx(0.010)
    assert figures["latency_s"]["total"]["p95"] > 1.5
    assert figures["latency_s"]["total"]["max"] == pytest.approx(2.01)
    assert figures["lag"]["share_late"] > 0.3


def test_a_server_that_keeps_up_shows_its_service_time_and_no_lag():
    records = run(open_loop(OneAtATime(0.010), scheduled(20, 5), LoadLimits()))
    figures = summary(records, target_s=0.02)
    assert figures["latency_s"]["total"]["max"] == pytest.approx(0.010)
    assert figures["lag"]["max_s"] == 0
    assert figures["goodput"]["share"] == 1
    assert figures["requests_per_s"] == pytest.approx(100 / 4.96)


def test_open_loop_requests_do_not_wait_for_those_before():
    server = OneAtATime(1.0)
    records = run(open_loop(server, scheduled(10, 1), LoadLimits()))
    assert server.most_under_way == 10
    assert [record.sent_s for record in sorted(records, key=lambda r: r.index)] == pytest.approx([i / 10 for i in range(10)])


def test_max_in_flight_bounds_what_is_under_way():
    server = OneAtATime(1.0)
    run(open_loop(server, scheduled(10, 1), LoadLimits(max_in_flight=3)))
    assert server.most_under_way == 3


def test_a_request_that_could_not_be_sent_in_time_is_a_failure_and_the_load_ends():
    """Nine seconds of work arrive at once; with one under way and two seconds for each, two are done."""
    at_once = [(0.0, request(index)) for index in range(10)]
    records = run(open_loop(OneAtATime(0.9), at_once, LoadLimits(max_in_flight=1, timeout_s=2.0)))
    codes = summary(records, target_s=None)["codes"]
    assert codes == {"OK": 2, "DEADLINE_EXCEEDED": 1, "NOT_SENT": 7}
    assert max(record.ended_s for record in records) < 2.1


def test_a_driver_that_never_comes_back_ends_with_its_grace():
    class Dead(OneAtATime):
        async def ask(self, request, timeout_s):
            await asyncio.sleep(1e6)
            raise AssertionError

    records = run(open_loop(Dead(0), scheduled(1, 1), LoadLimits(timeout_s=3.0)))
    assert [(record.code, record.ended_s) for record in records] == [("DEADLINE_EXCEEDED", 8.0)]


@pytest.mark.parametrize(("limits", "count"), [(LoadLimits(max_requests=7), 7), (LoadLimits(duration_s=0.25), 3)])
def test_an_open_loop_ends_at_its_bound(limits, count):
    records = run(open_loop(OneAtATime(0.001), scheduled(10, 5), limits))
    assert len(records) == count


def test_a_closed_loop_keeps_its_callers_busy():
    server = OneAtATime(0.1)
    records = run(closed_loop(server, map(request, range(1000)), 4, LoadLimits(duration_s=2.0)))
    assert server.most_under_way == 4
    assert len(records) == 20 + 3  # three were under way at the end and are waited for
    assert summary(records, target_s=None)["latency_s"]["total"]["p50"] == pytest.approx(0.4)


def test_a_closed_loop_stops_after_its_requests_or_when_there_are_no_more():
    assert len(run(closed_loop(OneAtATime(0.1), map(request, range(1000)), 4, LoadLimits(max_requests=6)))) == 6
    assert len(run(closed_loop(OneAtATime(0.1), map(request, range(5)), 4, LoadLimits(max_requests=50)))) == 5


def test_a_refusing_server_is_not_asked_in_a_tight_loop():
    class Full(OneAtATime):
        async def ask(self, request, timeout_s):
            return Answer(code="RESOURCE_EXHAUSTED", text="full")

    records = run(closed_loop(Full(0), map(request, range(10**6)), 1, LoadLimits(duration_s=1.0)))
    assert 50 <= len(records) <= 110
    assert summary(records, target_s=None)["num_refused"] == len(records)


@pytest.mark.parametrize(
    "pictures",
    [(), (PIXEL, PIXEL), (ReceivedPicture(encoded=bytes(3), raw_size=(2, 1)),), (ReceivedPicture(encoded=b"no picture"),)],
    ids=["none", "two", "bytes do not fit the size", "unreadable"],
)
def test_an_answer_without_the_pictures_asked_for_is_no_success(pictures):
    class Liar(OneAtATime):
        async def ask(self, request, timeout_s):
            return Answer(code="OK", pictures=pictures)

    [record] = run(open_loop(Liar(0), [(0.0, request(0))], LoadLimits()))
    assert record.code == "BAD_ANSWER"


def test_a_picture_of_another_size_is_no_success():
    asked = parse_mix("1: height=8, width=16").request("0", 0)
    [record] = run(open_loop(OneAtATime(0), [(0.0, asked)], LoadLimits()))
    assert record.code == "BAD_ANSWER"


def test_the_same_seed_asks_the_same_and_another_something_else():
    mix = parse_mix("1: num_inference_steps=1; 1: num_inference_steps=2")
    first = [mix.request("0", index) for index in range(50)]
    assert first == [mix.request("0", index) for index in range(50)]
    assert first != [mix.request("1", index) for index in range(50)]
    assert len({one.asked.seed for one in first}) == 50
    assert list(islice((one.index for one in first), 3)) == [0, 1, 2]

"""The router over replicas in memory: what it divides, what it merges, and what becomes of requests when replicas are lost."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from replica_doubles import (
    CRASHED,
    KILLED,
    PARAMS,
    Caller,
    assert_at_rest,
    assert_whole,
    counts,
    finish_all,
    router_of,
    settle,
    work_of,
)

from mii_serve.errors import (
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
    UnavailableError,
)
from mii_serve.server import router as router_module
from mii_serve.types import Done, ImageReady, Priority, Queued, Started, Step

WORK_OF_ONE_IMAGE = PARAMS.work_per_call * PARAMS.num_inference_steps


class TestDividing:
    async def test_images_go_to_replicas_in_neighbouring_groups_with_their_seeds(self):
        router, replicas = router_of(3)
        caller = Caller(router, work_of(num_images_per_prompt=5))
        await settle()
        ordered = [(one.params.seed, one.params.num_images_per_prompt) for replica in replicas for one in replica.running]
        assert ordered == [(5, 2), (7, 2), (9, 1)]
        finish_all(replicas)
        await caller.task
        assert_whole(caller)
        assert {event.image_index for event in caller.of(Started)} == set(range(5))
        assert_at_rest(router, replicas)

    async def test_the_seed_wraps_around(self):
        router, replicas = router_of(2)
        caller = Caller(router, work_of(num_images_per_prompt=2, seed=2**64 - 1))
        await settle()
        assert [replica.running[0].params.seed for replica in replicas] == [2**64 - 1, 0]
        finish_all(replicas)
        await caller.task
        assert_whole(caller)

    async def test_work_is_booked_at_once_and_falls_with_every_step(self):
        router, [replica] = router_of(1)
        caller = Caller(router, work_of(num_images_per_prompt=2))
        await settle()
        assert (replica.life.work, replica.life.num_running) == (2 * WORK_OF_ONE_IMAGE, 1)
        [generation] = replica.running
        generation.step(1, 3)
        assert replica.life.work == WORK_OF_ONE_IMAGE + PARAMS.work_per_call
        generation.image(0)
        await settle()
        assert replica.life.work == PARAMS.work_per_call
        generation.image(1)
        generation.done()
        await caller.task
        assert_at_rest(router, [replica])

    async def test_batch_work_is_booked_apart(self):
        router, [replica] = router_of(1)
        work = work_of(num_images_per_prompt=2)
        caller = Caller(router, replace(work, request=replace(work.request, priority=Priority.BATCH)))
        await settle()
        assert (replica.life.work, replica.life.batch_work) == (0, 2 * WORK_OF_ONE_IMAGE)
        finish_all([replica])
        await caller.task
        assert (replica.life.work, replica.life.batch_work) == (0, 0)

    async def test_a_scheduler_with_more_calls_than_steps_is_counted_as_it_reports(self):
        router, [replica] = router_of(1)
        caller = Caller(router, work_of())
        await settle()
        replica.running[0].order.on_step(0, 1, 9)
        assert replica.life.work == 8 * PARAMS.work_per_call
        await caller.leave()
        assert_at_rest(router, [replica])

    async def test_new_work_goes_where_least_is_left(self):
        router, replicas = router_of(2)
        callers = [Caller(router, work_of(num_inference_steps=40))]
        await settle()
        callers += [Caller(router, work_of(seed=seed)) for seed in range(4)]
        await settle()
        assert counts(replicas) == [1, 4]
        finish_all(replicas)
        await asyncio.gather(*(caller.task for caller in callers))
        assert_at_rest(router, replicas)

    async def test_the_order_carries_what_the_replica_must_know(self):
        router, [replica] = router_of(1)
        caller = Caller(router, work_of(timeout_s=30.0))
        await settle()
        [order] = replica.life.orders
        assert (order.request_id, order.client, order.left_s, order.has_steps) == ("r", "c", 30.0, True)
        assert order.request == caller.work.request
        await caller.leave()

    async def test_who_wants_no_steps_gets_none_and_the_work_falls_all_the_same(self):
        router, replicas = router_of(2)
        caller = Caller(router, work_of(num_images_per_prompt=2, has_steps=False))
        await settle()
        assert not any(order.has_steps for replica in replicas for order in replica.life.orders)
        replicas[0].running[0].step(0, 4)
        assert replicas[0].life.work == 0
        finish_all(replicas)
        await caller.task
        assert_whole(caller)
        assert not caller.of(Step)


class TestMerging:
    async def test_events_keep_the_order_of_their_replica_and_get_the_indexes_of_the_request(self):
        router, replicas = router_of(2)
        caller = Caller(router, work_of(num_images_per_prompt=2))
        await settle()
        for step in range(1, 5):
            for replica in replicas:
                replica.running[0].step(0, step)
                await settle()
        for replica in reversed(replicas):
            replica.running[0].image(0)
            replica.running[0].done()
        await caller.task
        assert [event.step for event in caller.of(Step) if event.image_index == 1] == [1, 2, 3, 4]
        assert_whole(caller)

    async def test_the_caller_has_one_place_in_the_queue_the_first_images(self):
        router, replicas = router_of(3)
        caller = Caller(router, work_of(num_images_per_prompt=3))
        await settle()
        for index in (2, 0, 1):
            replicas[index].running[0].put(Queued(num_samples_ahead=10 + index))
            await settle()
        assert [event.num_samples_ahead for event in caller.events] == [12, 10]
        await caller.leave()

    async def test_there_is_one_end_with_the_time_until_the_first_image_started(self):
        router, replicas = router_of(2)
        caller = Caller(router, work_of(num_images_per_prompt=2))
        await asyncio.sleep(3.0)
        replicas[1].running[0].start()
        await asyncio.sleep(2.0)
        replicas[0].running[0].finish()
        replicas[1].running[0].image(0)
        replicas[1].running[0].done()
        await caller.task
        [done] = caller.of(Done)
        assert (done.queued_s, done.total_s) == (3.0, 5.0)

    @pytest.mark.parametrize("error", [InvalidRequestError("scheduler", "is wrong"), EngineError("too large")])
    async def test_what_one_replica_refuses_is_refused_whole(self, error):
        router, replicas = router_of(3)
        caller = Caller(router, work_of(num_images_per_prompt=3))
        await settle()
        replicas[1].running[0].put(error)
        await caller.task
        assert caller.error is error
        assert_at_rest(router, replicas)

    async def test_a_defect_in_one_part_ends_the_request_too(self):
        router, replicas = router_of(2)
        caller = Caller(router, work_of(num_images_per_prompt=2))
        await settle()
        replicas[1].running[0].put(KeyError("a defect"))
        with pytest.raises(KeyError, match="a defect"):
            await caller.task
        assert_at_rest(router, replicas)

    async def test_a_slow_caller_leaves_events_with_the_replicas(self):
        router, replicas = router_of(2)
        work = work_of(num_images_per_prompt=2, num_inference_steps=100)
        stream = router.events(work)
        replicas_run = asyncio.create_task(anext(stream))
        await settle()
        finish_all(replicas)
        await replicas_run
        await settle()
        events = [event async for event in stream]
        steps = [event for event in events if isinstance(event, Step)]
        assert len(steps) <= 2 * 2 + router_module.MERGE_BUFFER, "only the latest wait"
        assert len([event for event in events if isinstance(event, ImageReady)]) == 2


class TestCallersWhoLeave:
    @pytest.mark.parametrize("num_images", [1, 5])
    async def test_nothing_is_left_behind(self, num_images):
        router, replicas = router_of(2)
        caller = Caller(router, work_of(num_images_per_prompt=num_images))
        await settle()
        for replica in replicas:
            for generation in replica.running:
                generation.start()
        await settle()
        await caller.leave()
        assert_at_rest(router, replicas)

    async def test_who_waits_for_a_replica_leaves_the_queue(self):
        router, [replica] = router_of(1)
        replica.lose()
        caller = Caller(router, work_of())
        await settle()
        assert len(router._waiting) == 1
        await caller.leave()
        assert not router._waiting

    async def test_who_leaves_at_the_moment_a_replica_comes_back(self):
        router, [replica] = router_of(1)
        replica.lose()
        caller = Caller(router, work_of())
        await settle()
        replica.start()
        assert replica.life.num_running == 1, "it is booked, and has not been told"
        await caller.leave()
        assert_at_rest(router, [replica])

    async def test_who_leaves_while_it_is_not_known_why_a_replica_was_lost(self):
        router, [replica] = router_of(1)
        caller = Caller(router, work_of())
        await settle()
        replica.life.break_stream()
        await settle()
        await caller.leave()
        assert_at_rest(router, [replica])
        assert not replica.life.lost.cancelled(), "the next one wants to know as well"

    async def test_who_leaves_at_the_moment_it_is_known_why(self):
        router, [replica] = router_of(1)
        caller = Caller(router, work_of())
        await settle()
        life = replica.life
        life.break_stream()
        await settle()
        life.lost.set_result(KILLED)
        caller.task.cancel()
        await settle()
        assert caller.task.cancelled()
        assert_at_rest(router, [replica])

    async def test_a_suspect_who_leaves_frees_the_replica_that_was_emptied_for_it(self):
        router, replicas = router_of(2)
        suspect, other = Caller(router, work_of()), Caller(router, work_of(seed=9))
        await settle()
        replicas[0].running[0].start()
        await settle()
        replicas[0].lose(CRASHED)
        await settle()
        assert len(router._suspects) == 1, "the other replica is emptied for it"
        waiting = Caller(router, work_of(seed=20))
        await settle()
        assert len(router._waiting) == 1
        await suspect.leave()
        await settle()
        assert counts(replicas) == [0, 2]
        finish_all(replicas)
        await asyncio.gather(other.task, waiting.task)
        assert_at_rest(router, replicas)


class TestWaiting:
    async def test_without_any_replica_it_waits_for_one(self):
        router, [replica] = router_of(1)
        replica.lose()
        caller = Caller(router, work_of())
        await asyncio.sleep(100.0)
        replica.start()
        await settle()
        finish_all([replica])
        await caller.task
        assert_whole(caller)

    async def test_patience_counts_from_when_the_last_replica_was_lost_or_the_request_came(self):
        router, [replica] = router_of(1, patience_s=10.0)
        replica.lose()
        await asyncio.sleep(7.0)
        caller, loop = Caller(router, work_of()), asyncio.get_running_loop()
        came_at = loop.time()
        await caller.task
        assert isinstance(caller.error, UnavailableError) and "within 10 s" in str(caller.error)
        assert loop.time() - came_at == pytest.approx(10.0)
        assert not router._waiting

    async def test_a_deadline_comes_before_patience(self):
        router, [replica] = router_of(1, patience_s=10.0)
        replica.lose()
        caller, loop = Caller(router, work_of(timeout_s=3.0)), asyncio.get_running_loop()
        await caller.task
        assert isinstance(caller.error, DeadlineExceededError) and loop.time() == pytest.approx(3.0)

    async def test_a_busy_replica_is_waited_for_longer_than_patience(self):
        router, [replica] = router_of(1, patience_s=1.0)
        callers = [Caller(router, work_of(seed=seed)) for seed in (0, 1)]
        await settle()
        for generation in replica.running:
            generation.start()
        await settle()
        replica.lose(CRASHED)
        await settle()
        replica.start()
        for _ in callers:
            await asyncio.sleep(50.0)
            assert len(replica.running) == 1, "suspects, one at a time"
            finish_all([replica])
        await asyncio.gather(*(caller.task for caller in callers))
        for caller in callers:
            assert_whole(caller)

    async def test_those_who_wait_have_a_bound(self, monkeypatch):
        monkeypatch.setattr(router_module, "MAX_WAITING", 2)
        router, [replica] = router_of(1)
        replica.lose()
        callers = [Caller(router, work_of(seed=seed)) for seed in range(3)]
        await settle()
        assert isinstance(callers[2].error, QueueFullError) and callers[2].error.retry_after_s == router_module.RETRY_AFTER_S
        replica.start()
        await settle()
        finish_all([replica])
        await asyncio.gather(*(caller.task for caller in callers))
        for caller in callers[:2]:
            assert_whole(caller)

    async def test_requests_are_served_in_the_order_they_came(self):
        router, [replica] = router_of(1)
        replica.lose()
        callers = [Caller(router, work_of(seed=seed)) for seed in (3, 1, 2)]
        await settle()
        replica.start()
        await settle()
        assert [order.request.params.seed for order in replica.life.orders] == [3, 1, 2]
        for caller in callers:
            await caller.leave()

"""The router over replicas in memory: what becomes of requests when replicas are lost."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replica_doubles import (
    CRASHED,
    KILLED,
    PARAMS,
    Caller,
    FakeReplica,
    assert_at_rest,
    assert_whole,
    counts,
    finish_all,
    router_of,
    settle,
    work_of,
)
from virtual_time import run

from mii_serve.errors import (
    DeadlineExceededError,
    MiiServeError,
    PoisonedRequestError,
    UnavailableError,
)
from mii_serve.server import router as router_module
from mii_serve.server.router import Router
from mii_serve.types import Done, Restarted, Started, Step

WORK_OF_ONE_IMAGE = PARAMS.work_per_call * PARAMS.num_inference_steps


class TestLosses:
    @pytest.mark.parametrize(
        ("made", "again"), [((0, 1), [(0, 1, 2), (1, 2)]), ((1, 2), [(1, 2), (2,)]), ((2, 0), [(2,), (2,)])]
    )
    async def test_before_its_start_in_the_middle_and_after_some_images(self, made, again):
        router, replicas = router_of(1)
        [replica] = replicas
        caller = Caller(router, work_of(num_images_per_prompt=3))
        for num_images in made:
            await settle()
            [generation] = replica.running
            assert generation.params.num_images_per_prompt == 3, "a part is made again whole"
            for index in range(num_images):
                generation.start(index)
                generation.step(index, 4)
                generation.image(index)
            await settle()
            replica.lose(KILLED)
            replica.start()
        await settle()
        finish_all(replicas)
        await caller.task
        assert_whole(caller)
        assert [event.image_indexes for event in caller.of(Restarted)] == again
        after = caller.events[max(index for index, event in enumerate(caller.events) if isinstance(event, Restarted)) :]
        told = {event.image_index for event in after if isinstance(event, Started | Step)}
        assert told == set(again[-1]), "of images that were delivered nothing more is told"
        assert_at_rest(router, replicas)

    async def test_only_the_lost_replicas_images_are_made_again(self):
        router, replicas = router_of(3)
        caller = Caller(router, work_of(num_images_per_prompt=6))
        await settle()
        replicas[1].lose()
        await settle()
        assert counts(replicas) == [2, 0, 2], "what was alone on a lost replica needs an empty one"
        replicas[1].start()
        await settle()
        assert counts(replicas) == [2, 2, 2]
        finish_all(replicas)
        await caller.task
        assert_whole(caller)
        assert [event.image_indexes for event in caller.of(Restarted)] == [(2, 3)]

    async def test_a_loss_between_the_last_image_and_the_end(self):
        router, [replica] = router_of(1)
        caller = Caller(router, work_of())
        await settle()
        replica.running[0].start()
        replica.running[0].image(0)
        await settle()
        replica.lose()
        replica.start()
        await settle()
        finish_all([replica])
        await caller.task
        assert_whole(caller)

    async def test_many_losses_end_the_request(self, monkeypatch):
        monkeypatch.setattr(router_module, "MAX_LOSSES", 2)
        router, [replica] = router_of(1)
        callers = [Caller(router, work_of(seed=seed)) for seed in range(2)]
        for _ in range(2):
            await settle()
            replica.lose(KILLED)
            replica.start()
        await asyncio.gather(*(caller.task for caller in callers))
        for caller in callers:
            assert isinstance(caller.error, UnavailableError) and "2 replicas were lost" in str(caller.error)
        assert_at_rest(router, [replica])

    async def test_a_break_of_unknown_reason_is_no_crash(self):
        router, replicas = router_of(2)
        caller = Caller(router, work_of())
        await settle()
        replicas[0].running[0].start()
        await settle()
        replicas[0].life.break_stream()
        await settle()
        assert not replicas[1].running, "it waits to be told"
        await asyncio.sleep(router_module.VERDICT_TIMEOUT_S + 1)
        assert len(replicas[1].running) == 1
        finish_all(replicas[1:])
        await caller.task
        assert_whole(caller)

    async def test_a_deadline_holds_while_it_is_not_known_why_a_replica_was_lost(self):
        router, replicas = router_of(2)
        caller, loop = Caller(router, work_of(timeout_s=2.0)), asyncio.get_running_loop()
        await settle()
        replicas[0].life.break_stream()
        await caller.task
        assert isinstance(caller.error, DeadlineExceededError) and loop.time() == pytest.approx(2.0)
        assert_at_rest(router, replicas)

    async def test_the_time_left_shrinks_from_replica_to_replica(self):
        router, [replica] = router_of(1)
        caller = Caller(router, work_of(timeout_s=10.0))
        await asyncio.sleep(4.0)
        replica.lose()
        replica.start()
        await settle()
        assert replica.life.orders[0].left_s == pytest.approx(6.0)
        await caller.task
        assert isinstance(caller.error, DeadlineExceededError)


class TestSuspects:
    async def crash_under(self, router: Router, replica: FakeReplica) -> None:
        await settle()
        for generation in replica.running:
            generation.start()
        await settle()
        replica.lose(CRASHED)
        replica.start()
        await settle()

    async def test_two_crashes_the_second_of_them_alone_are_blame(self):
        router, [replica] = router_of(1)
        caller = Caller(router, work_of())
        await self.crash_under(router, replica)
        assert replica.life.is_isolated
        await self.crash_under(router, replica)
        await caller.task
        assert isinstance(caller.error, PoisonedRequestError)
        assert_at_rest(router, [replica])

    async def test_those_who_were_beside_it_are_made_alone_and_live(self):
        router, [replica] = router_of(1)
        guilty, *innocents = callers = [Caller(router, work_of(seed=seed)) for seed in range(4)]
        await self.crash_under(router, replica)
        for _ in callers:
            [generation] = replica.running
            if generation.params.seed == 0:
                await self.crash_under(router, replica)
            else:
                generation.finish()
                await settle()
        await asyncio.gather(*(caller.task for caller in callers))
        assert isinstance(guilty.error, PoisonedRequestError)
        for caller in innocents:
            assert_whole(caller)
            assert len(caller.of(Restarted)) == 1
        assert_at_rest(router, [replica])

    async def test_nothing_joins_a_suspect(self):
        router, replicas = router_of(2)
        suspect = Caller(router, work_of())
        await self.crash_under(router, replicas[0])
        [alone] = [replica for replica in replicas if replica.running]
        others = [Caller(router, work_of(seed=seed)) for seed in range(3)]
        await settle()
        assert alone.life.is_isolated and len(alone.running) == 1
        finish_all(replicas)
        await asyncio.gather(suspect.task, *(caller.task for caller in others))
        assert_at_rest(router, replicas)

    async def test_who_had_not_begun_is_no_suspect_after_one_crash(self):
        router, replicas = router_of(1)
        [replica] = replicas
        begun, waiting = Caller(router, work_of(seed=0)), Caller(router, work_of(seed=1))
        await settle()
        replica.running[0].start()
        await settle()
        replica.lose(CRASHED)
        await settle()
        assert (len(router._suspects), len(router._waiting)) == (1, 1)
        replica.start()
        await settle()
        finish_all(replicas)
        await settle()
        finish_all(replicas)
        await asyncio.gather(begun.task, waiting.task)

    async def test_three_kills_alone_are_blame_and_two_are_not(self):
        router, [replica] = router_of(1)
        for num_kills, error in ((2, None), (3, PoisonedRequestError)):
            caller = Caller(router, work_of(seed=num_kills, prompt=f"{num_kills}"))
            for _ in range(num_kills):
                await settle()
                replica.lose(KILLED)
                replica.start()
            await settle()
            finish_all([replica])
            await caller.task
            assert type(caller.error) is (error or type(None))

    async def test_a_step_that_nobody_asked_for_says_that_it_had_begun(self):
        """The order without steps: `on_step` hears of them all the same."""
        router, [replica] = router_of(1)
        caller, beside = Caller(router, work_of(has_steps=False)), Caller(router, work_of(seed=9))
        await settle()
        replica.running[0].step(0, 1)
        replica.lose(CRASHED)
        await settle()
        assert (len(router._suspects), len(router._waiting)) == (1, 1)
        await caller.leave()
        await beside.leave()

    async def test_one_like_it_is_alone_from_its_start_until_one_succeeds(self):
        router, [replica] = router_of(1)
        caller = Caller(router, work_of())
        await self.crash_under(router, replica)
        await self.crash_under(router, replica)
        await caller.task
        again = Caller(router, work_of(seed=77, num_images_per_prompt=2))
        await settle()
        assert replica.life.is_isolated
        finish_all([replica])
        await again.task
        assert_whole(again)
        third = Caller(router, work_of(seed=78))
        await settle()
        assert replica.running and not replica.life.is_isolated
        await third.leave()

    async def test_one_like_it_is_refused_after_one_crash(self):
        router, [replica] = router_of(1)
        for num_crashes in (2, 1):
            caller = Caller(router, work_of())
            for _ in range(num_crashes):
                await self.crash_under(router, replica)
            await caller.task
            assert isinstance(caller.error, PoisonedRequestError)

    async def test_what_is_remembered_has_a_bound(self, monkeypatch):
        monkeypatch.setattr(router_module, "MAX_REMEMBERED", 2)
        router, _ = router_of(1)
        for prompt in "abc":
            router._remember(replace(PARAMS, prompt=prompt))
        assert len(router._poisoned) == 2
        assert router_module._kind_of(replace(PARAMS, prompt="a")) not in router._poisoned


class Chance:
    """A schedule: at each of its turns a caller comes, a caller leaves, a replica works on, is lost, or comes back."""

    def __init__(self, data: st.DataObject, num_replicas: int) -> None:
        self._data = data
        self.router, self.replicas = router_of(num_replicas, patience_s=30.0)
        self.callers: list[Caller] = []
        self.left: set[Caller] = set()

    async def turn(self) -> None:
        draw, kinds = self._data.draw, ["come", "leave", "work", "work", "finish", "lose", "return", "wait"]
        match draw(st.sampled_from(kinds)):
            case "come" if len(self.callers) < 8:
                work = work_of(
                    seed=100 * len(self.callers),
                    num_images_per_prompt=draw(st.integers(1, 5)),
                    has_steps=draw(st.booleans()),
                    timeout_s=draw(st.sampled_from([None, 5.0, 60.0])),
                )
                self.callers.append(Caller(self.router, work))
            case "leave" if self.callers:
                caller = draw(st.sampled_from(self.callers))
                if not caller.task.done():
                    self.left.add(caller)
                    await caller.leave()
            case "work" if running := [one for replica in self.replicas for one in replica.running]:
                generation = draw(st.sampled_from(running))
                index = draw(st.integers(0, generation.params.num_images_per_prompt - 1))
                generation.start(index)
                generation.step(index, draw(st.integers(1, 4)))
            case "finish" if running := [one for replica in self.replicas for one in replica.running]:
                draw(st.sampled_from(running)).finish()
            case "lose" if up := [replica for replica in self.replicas if replica.is_up]:
                draw(st.sampled_from(up)).lose(draw(st.sampled_from([KILLED, CRASHED])))
            case "return" if down := [replica for replica in self.replicas if not replica.is_up]:
                draw(st.sampled_from(down)).start()
            case "wait":
                await asyncio.sleep(draw(st.sampled_from([0.1, 3.0])))
        if draw(st.booleans()):
            await settle()

    async def end(self) -> None:
        """All replicas are there and do their work."""
        for replica in self.replicas:
            if not replica.is_up:
                replica.start()
        for _ in range(20 * len(self.callers)):
            await settle()
            finish_all(self.replicas)
        assert all(caller.task.done() for caller in self.callers), "a request has no end"
        await asyncio.gather(*(caller.task for caller in self.callers), return_exceptions=True)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), num_replicas=st.integers(1, 3), num_turns=st.integers(5, 25))
def test_whatever_happens_each_request_has_one_end_and_nothing_is_left_behind(data, num_replicas, num_turns):
    async def main() -> None:
        chance = Chance(data, num_replicas)
        for _ in range(num_turns):
            await chance.turn()
        await chance.end()
        for caller in chance.callers:
            if caller in chance.left:
                assert caller.task.cancelled()
                continue
            indexes = [image.image_index for image in caller.images]
            assert len(indexes) == len(set(indexes)), "each image once"
            if caller.error is None:
                assert_whole(caller)
            else:
                assert isinstance(caller.error, MiiServeError) and not caller.of(Done)
        await settle()
        assert_at_rest(chance.router, chance.replicas)

    run(main())

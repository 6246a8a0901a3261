"""The scheduler's promises, tried with random arrivals, cancellations, failures and batch keys."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule
from player import Player, request, scheduler_of

from mii_serve.errors import DeadlineExceededError, EngineError, QueueFullError
from mii_serve.scheduler import Scheduler
from mii_serve.types import InputImage, Priority, Request, SampleId, SampleProgress, StepPlan


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, drops and deadlines at any moment, also while a turn is running."""

    requests = Bundle("requests")

    def __init__(self):
        super().__init__()
        self.max_slots, self.max_decodes = 3, 2
        self.scheduler = scheduler_of(self.max_slots, max_decodes=self.max_decodes, max_waiting=20, batch_share=0.1)
        self.by_name: dict[str, Request] = {}
        self.player = Player(self.scheduler, {})
        self.done: Counter[SampleId] = Counter()
        self.dropped: set[str] = set()
        self.failed: set[SampleId] = set()
        self.plans: list[StepPlan] = []  # at most one runs, and one is prepared
        self.decoding: list[SampleProgress] = []  # pictures that come after their turn
        self.now = 0.0
        self.previewed: Counter[SampleId] = Counter()

    @rule(
        target=requests,
        num_images=strategies.integers(1, 4),
        num_calls=strategies.integers(1, 6),
        guidance=strategies.sampled_from([1.0, 3.0]),
        size=strategies.sampled_from([(64, 64), (64, 128), (128, 64)]),
        kind=strategies.integers(0, 1),
        client=strategies.sampled_from(["a", "b"]),
        priority=strategies.sampled_from(Priority),
        preview_every=strategies.sampled_from([None, 1, 2]),
        patience=strategies.sampled_from([None, 200.0]),
    )
    def add(self, num_images, num_calls, guidance, size, kind, client, priority, preview_every, patience):
        name = f"r{len(self.by_name)}"
        asked = request(
            name,
            num_images,
            num_calls,
            guidance=guidance,
            size=size,
            kind=kind,
            client=client,
            priority=priority,
            preview_every=preview_every,
            deadline=None if patience is None else self.now + patience,
        )
        waiting = self.scheduler.num_waiting + self.scheduler.batch.num_waiting
        self.by_name[name] = asked
        try:
            position = self.scheduler.add(asked, self.now)
        except (QueueFullError, DeadlineExceededError):
            assert self.scheduler.num_waiting + self.scheduler.batch.num_waiting == waiting
            del self.by_name[name]
            self.by_name[f"refused {name}"] = asked
            return multiple()
        assert position.num_samples_ahead >= 0
        assert position.estimated_wait_s is None or 0 <= position.estimated_wait_s < 1e6
        self.player.num_calls[name] = num_calls
        return name

    @rule(name=consumes(requests))
    def drop(self, name):
        self.scheduler.drop(name)
        self.dropped.add(name)

    @rule(seconds=strategies.floats(0, 60))
    def time_passes(self, seconds):
        self.now += seconds
        late = self.scheduler.expire(self.now)
        for name in late:
            assert self.by_name[name].deadline <= self.now
        self.dropped |= late

    @precondition(lambda self: len(self.plans) < 2)
    @rule()
    def begin_turn(self):
        plan = self.scheduler.plan()
        if plan is None:
            return
        self.plans.append(plan)
        assert len({self.by_name[s.request_id].params.batch_key for s in plan.steps}) <= 1
        assert len(plan.decodes) <= self.max_decodes
        assert len(plan.previews) <= 1
        assert set(plan.previews) <= set(plan.steps)
        assert not {sample.id for sample in plan.joins} & set(plan.leaves), "what its turns tell would be of two attempts"
        for sample_id in (*plan.steps, *plan.decodes):
            assert sample_id.request_id not in self.dropped
            assert not self.done[sample_id]
            assert sample_id not in self.failed
        leaving = {sample_id for planned in self.plans for sample_id in planned.leaves}
        for name in self.dropped:
            assert not any(s.request_id == name for s in self.player.steps if s not in leaving)

    @precondition(lambda self: self.plans)
    @rule(fails=strategies.booleans(), is_decoded_beside=strategies.booleans())
    def end_turn(self, fails, is_decoded_beside):
        plan = self.plans.pop(0)
        failing = plan.steps[0] if fails and plan.steps and plan.steps[0] not in self.failed else None
        answers = self.player.answer(plan, failing)
        if is_decoded_beside:
            self.decoding += [progress for progress in answers if progress.picture is not None]
            answers = [replace(progress, picture=None) for progress in answers if progress.id in plan.steps]
        for progress in answers:
            self.done[progress.id] += progress.picture is not None
        self.scheduler.advance(answers, 1.0)
        if failing is not None:
            self.failed.add(failing)
            self.scheduler.drop(failing.request_id)
            self.dropped.add(failing.request_id)

    @precondition(lambda self: self.decoding)
    @rule()
    def picture_comes(self):
        progress = self.decoding.pop(0)
        self.done[progress.id] += 1
        self.scheduler.end(progress)

    @invariant()
    def never_more_than_fit(self):
        assert self.scheduler.num_running <= self.max_slots
        assert len(self.scheduler._decoding) <= self.max_slots

    @invariant()
    def no_picture_twice(self):
        assert all(count <= 1 for count in self.done.values())

    def teardown(self):
        while self.plans:
            self.end_turn(fails=False, is_decoded_beside=False)
        while self.decoding:
            self.picture_comes()
        for _ in range(2000):
            plan = self.scheduler.plan()
            if plan is None:
                break
            answers = self.player.answer(plan)
            for progress in answers:
                self.done[progress.id] += progress.picture is not None
            self.scheduler.advance(answers, 1.0)
        else:
            pytest.fail("it does not come to rest")
        for name, asked in self.by_name.items():
            if name in self.dropped or name.startswith("refused"):
                continue
            for index in range(asked.params.num_images_per_prompt):
                assert self.done[SampleId(name, index)] == 1, "nothing is lost"
        assert not self.player.steps, "the engine holds nothing"
        batch, scheduler = self.scheduler.batch, self.scheduler
        assert (scheduler.num_running, scheduler.num_waiting, batch.num_waiting, batch.num_parked) == (0, 0, 0, 0)
        leftovers = [scheduler._deadlines, scheduler._groups, scheduler._finished, scheduler._decoding, scheduler._leaving]
        assert not any(leftovers) and not scheduler._num_others
        assert not any(any([q._heap, q._of_request, q._last_tag, q._waiting]) for q in (scheduler._queue, batch.queue))


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


# ---- one promise each --------------------------------------------------------------------------------------------


def play(scheduler: Scheduler, *requests: Request) -> Player:
    for asked in requests:
        scheduler.add(asked, 0.0)
    return Player(scheduler, {asked.id: asked.num_calls for asked in requests})


def test_nothing_to_do_is_no_plan():
    assert scheduler_of().plan() is None


def test_a_full_queue_refuses_the_whole_request():
    scheduler = scheduler_of(1, max_waiting=3)
    scheduler.add(request("first", 2), 0.0)
    with pytest.raises(QueueFullError):
        scheduler.add(request("second", 3), 0.0)
    assert scheduler.num_waiting == 2
    scheduler.add(request("third", 2), 0.0)


def test_a_queue_that_is_too_long_in_seconds_refuses():
    scheduler = scheduler_of(1, max_wait_s=30.0)
    player = play(scheduler, request("running", num_calls=10))
    player.turn(1.0)
    scheduler.add(request("waiting", num_calls=40), 0.0)
    with pytest.raises(QueueFullError, match="s long"):
        scheduler.add(request("late", num_calls=1), 0.0)


def test_a_dropped_request_is_out_of_the_next_plan_and_its_slot_is_taken():
    scheduler = scheduler_of(2)
    player = play(scheduler, request("a", 2, 9), request("b", 1, 9))
    player.turn()
    scheduler.drop("a")
    plan = player.turn()
    assert set(plan.leaves) == {SampleId("a", 0), SampleId("a", 1)}
    assert plan.steps == (SampleId("b", 0),)


@given(keys=strategies.lists(strategies.tuples(strategies.sampled_from([64, 128]), strategies.integers(0, 2)), min_size=1))
def test_samples_share_a_call_exactly_when_their_keys_agree_and_no_key_waits_longer_than_a_turn_of_each_other(keys):
    scheduler, num_calls = scheduler_of(len(keys)), 3
    requests = [request(f"r{i}", num_calls=num_calls, size=(64, width), kind=kind) for i, (width, kind) in enumerate(keys)]
    player = play(scheduler, *requests)
    num_keys = len(set(keys))
    turns = [{sample_id.request_id for sample_id in player.turn().steps} for _ in range(num_calls * num_keys)]
    expected = [{f"r{i}" for i, key in enumerate(keys) if key == one} for one in dict.fromkeys(keys)]
    assert turns == expected * num_calls


def test_shapes_take_turns():
    scheduler = scheduler_of(4)
    player = play(
        scheduler, *(request(f"r{i}", 1, 9, size=size) for i, size in enumerate([(64, 64), (64, 64), (128, 64), (64, 128)]))
    )
    turns = [{s.request_id for s in player.turn().steps} for _ in range(6)]
    assert turns == [{"r0", "r1"}, {"r2"}, {"r3"}] * 2


def test_no_running_sample_waits_longer_than_one_turn_of_each_shape():
    scheduler = scheduler_of(6)
    sizes = [(64, 64), (128, 64), (64, 128), (128, 128)]
    player = play(scheduler, *(request(f"r{i}", 1, 30, size=sizes[i % 4]) for i in range(6)))
    last_step = dict.fromkeys((f"r{i}" for i in range(6)), 0)
    for turn in range(1, 60):
        for sample_id in player.turn().steps:
            assert turn - last_step[sample_id.request_id] <= len(sizes)
            last_step[sample_id.request_id] = turn


def test_a_burst_of_endings_is_decoded_a_few_at_a_time_while_others_go_on():
    scheduler = scheduler_of(6, max_decodes=2)
    player = play(scheduler, request("ends", 5, 1), request("goes on", 1, 9))
    plans = [player.turn() for _ in range(4)]
    assert [len(plan.decodes) for plan in plans] == [2, 2, 1, 0]
    assert all(SampleId("goes on", 0) in plan.steps for plan in plans)


def test_a_sample_that_waits_for_the_decoder_keeps_its_slot_and_makes_no_more_steps():
    scheduler = scheduler_of(2, max_decodes=1)
    player = play(scheduler, request("a", 2, 1), request("b", 1, 1))
    first, second = player.turn(), player.turn()
    assert len(first.steps) == 2
    assert second.steps == (SampleId("b", 0),), "one slot is free, the other is held until its picture is there"


def test_previews_come_one_a_turn_and_none_is_forgotten():
    scheduler = scheduler_of(3)
    player = play(scheduler, request("a", 3, 10, preview_every=5))
    shown = [player.turn().previews for _ in range(10)]
    assert [len(previews) for previews in shown] == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert {previews[0].image_index for previews in shown if previews} == {0, 1, 2}


def test_one_client_with_many_requests_does_not_starve_one_with_one():
    scheduler = scheduler_of(1)
    many = [request(f"many{i}", client="greedy") for i in range(500)]
    player = play(scheduler, *many)
    player.turn()
    scheduler.add(request("one", client="modest"), 0.0)
    player.num_calls["one"] = 2
    for _ in range(12):
        player.turn()
    assert "one" in [sample_id.request_id for sample_id in player.joined[:4]]


def test_a_high_priority_goes_before_what_waits_and_a_low_one_is_served_in_the_end():
    scheduler = scheduler_of(1)
    player = play(scheduler, request("low", client="l", priority=Priority.LOW))
    scheduler.drop("low")
    scheduler.add(request("running", client="n"), 0.0)
    player.num_calls["running"] = 2
    player.turn()
    scheduler.add(request("low", client="l", priority=Priority.LOW), 0.0)
    for i in range(200):
        name = f"high{i}"
        scheduler.add(request(name, client=f"h{i % 3}", priority=Priority.HIGH), 0.0)
        player.num_calls[name] = 2
    order = []
    while "low" not in order:
        player.turn()
        order = [sample_id.request_id for sample_id in player.joined]
    assert order[1].startswith("high")
    assert 10 < order.index("low") < 100


def test_within_one_client_it_is_first_come_first_served():
    scheduler = scheduler_of(1)
    player = play(scheduler, *(request(f"r{i}", num_calls=1 + i % 3) for i in range(20)))
    while player.turn():
        pass
    assert [sample_id.request_id for sample_id in player.joined] == [f"r{i}" for i in range(20)]


def test_a_client_that_gives_up_a_long_queue_is_not_punished_for_it():
    scheduler = scheduler_of(1)
    player = play(scheduler, *(request(f"gone{i}", client="a") for i in range(50)))
    player.turn()
    for i in range(49, 0, -1):
        scheduler.drop(f"gone{i}")
    for name, client in (("b0", "b"), ("a0", "a"), ("b1", "b")):
        scheduler.add(request(name, client=client), 0.0)
        player.num_calls[name] = 2
    while player.turn():
        pass
    assert [sample_id.request_id for sample_id in player.joined] == ["gone0", "b0", "a0", "b1"]


def test_a_deadline_that_cannot_be_kept_is_refused_on_arrival():
    scheduler = scheduler_of(1)
    player = play(scheduler, request("a", num_calls=20))
    player.turn(1.0)
    with pytest.raises(DeadlineExceededError, match="s are left"):
        scheduler.add(request("b", num_calls=5, deadline=10.0), 0.0)
    scheduler.add(request("c", num_calls=5, deadline=40.0), 0.0)


def test_one_slow_turn_does_not_lock_an_idle_server():
    scheduler = scheduler_of(1)
    player = play(scheduler, request("a", num_calls=2))
    player.turn(0.1)
    player.turn(1000.0)
    assert scheduler.plan() is None
    scheduler.add(request("b", num_calls=10, deadline=5.0), 0.0)


def test_what_has_missed_its_deadline_is_dropped_between_steps_and_named():
    scheduler = scheduler_of(1)
    player = play(scheduler, request("late", num_calls=9, deadline=5.0), request("waits", deadline=6.0), request("stays"))
    player.turn()
    assert scheduler.expire(4.9) == set()
    assert scheduler.expire(6.0) == {"late", "waits"}
    plan = player.turn()
    assert plan.leaves == (SampleId("late", 0),)
    assert plan.steps == (SampleId("stays", 0),)


def test_places_in_the_queue_and_the_time_left_are_estimated_from_the_measured_step_time():
    scheduler = scheduler_of(1)
    player = play(scheduler, request("a", num_calls=4), request("b", num_calls=4), request("c", num_calls=4))
    assert [name for name, _ in scheduler.positions()] == ["a", "b", "c"]
    player.turn(2.0)
    assert scheduler.remaining_s(SampleId("a", 0)) == pytest.approx(6.0)
    (_, b), (_, c) = scheduler.positions()
    assert (b.num_samples_ahead, c.num_samples_ahead) == (0, 1)
    assert (b.estimated_wait_s, c.estimated_wait_s) == (pytest.approx(6.0), pytest.approx(14.0))


def test_an_engine_that_counts_differently_is_an_error():
    scheduler = scheduler_of(1)
    scheduler.add(request("a", num_calls=4), 0.0)
    scheduler.plan()
    with pytest.raises(EngineError, match="step"):
        scheduler.advance([SampleProgress(id=SampleId("a", 0), step=2, num_steps=4)], 1.0)


def test_a_turn_planned_ahead_counts_the_calls_that_are_under_way():
    scheduler = scheduler_of(2)
    player = play(scheduler, request("short", 1, 2), request("long", 1, 9))
    first, second = scheduler.plan(), scheduler.plan()
    assert second.decodes == (SampleId("short", 0),), "its second and last call is in this turn"
    scheduler.add(request("next", num_calls=9), 0.0)
    player.num_calls["next"] = 9
    third = scheduler.plan()
    assert third.steps == (SampleId("long", 0), SampleId("next", 0)), "the slot is free once the decoder has the picture"
    for plan in (first, second, third):
        scheduler.advance(player.answer(plan), 1.0)
    assert scheduler.remaining_s(SampleId("long", 0)) == 6.0, "three calls are known to be made"


def test_each_turn_takes_the_time_of_its_own_key():
    scheduler = scheduler_of(2)
    player = play(scheduler, request("small", 1, 9), request("large", 1, 9, size=(128, 128)))
    plans = [scheduler.plan(), scheduler.plan()]
    for plan, elapsed_s in zip(plans, (1.0, 5.0), strict=True):
        scheduler.advance(player.answer(plan), elapsed_s)
    assert scheduler._step_time.fastest_s((8, 8, 0)) == 1.0
    assert scheduler._step_time.fastest_s((16, 16, 0)) == 5.0


def test_no_more_pictures_are_in_the_decoder_than_there_are_slots():
    scheduler = scheduler_of(2, max_decodes=2)
    play(scheduler, request("a", 8, 1))
    plans = [scheduler.plan() for _ in range(3)]
    assert [len(plan.decodes) for plan in plans[:2]] == [2, 0], "its pictures have not come yet"
    assert plans[2] is None


def test_images_to_encode_join_as_many_at_once_as_are_decoded_and_encoded_ones_all_at_once():
    image = InputImage(rgb=b"")
    for encoded, num_joins in ((None, 1), (object(), 3)):
        scheduler = scheduler_of(4, max_decodes=1)
        for i in range(3):
            scheduler.add(replace(request(f"r{i}", 1, 2), input_image=image, encoded_image=encoded), 0.0)
        plan = scheduler.plan()
        assert plan is not None and len(plan.joins) == num_joins

"""Batch requests give way to all others, and are never forgotten."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings, strategies
from player import Player, request, scheduler_of

from mii_serve.errors import QueueFullError
from mii_serve.types import BatchShape, Priority, Request, SampleId, StepPlan

NUM_TICKS = 60


def batch(name: str, num_images: int = 1, num_calls: int = 2, **more) -> Request:
    return request(name, num_images, num_calls, priority=Priority.BATCH, **more)


def buckets(*counts: int) -> tuple[BatchShape, ...]:
    """For guided samples of 64 x 64 pixels."""
    return tuple(BatchShape(count, 2 * count, 8, 8) for count in counts)


# ---- the others do not notice ------------------------------------------------------------------------------------

ARRIVALS = strategies.lists(
    strategies.fixed_dictionaries(
        {
            "tick": strategies.integers(0, NUM_TICKS - 20),
            "num_images": strategies.integers(1, 3),
            "num_calls": strategies.integers(1, 9),
            "guidance": strategies.sampled_from([1.0, 3.0]),
            "kind": strategies.integers(0, 1),
            "client": strategies.sampled_from(["a", "b"]),
            "priority": strategies.sampled_from([Priority.HIGH, Priority.NORMAL, Priority.LOW]),
            "preview_every": strategies.sampled_from([None, 2]),
            "dropped_after": strategies.sampled_from([None, None, 3]),
        }
    ),
    max_size=12,
)


def others_in(plan: StepPlan | None) -> list[object]:
    """What a plan does for requests that are not batch requests; nothing, where there is no plan."""
    if plan is None:
        return [[]] * 5
    joins = [sample.id for sample in plan.joins]
    return [
        [sample_id for sample_id in part if not sample_id.request_id.startswith("batch")]
        for part in (joins, plan.steps, plan.previews, plan.decodes, plan.leaves)
    ]


def run(
    arrivals: list[dict], *, max_slots: int, flood: int, shapes: tuple[BatchShape, ...] = (), num_ahead: int = 0
) -> list[object]:
    """What the others see, tick by tick; `flood` batch images with different numbers of calls wait at every moment."""
    scheduler, numbers = scheduler_of(max_slots, max_decodes=2, buckets=shapes), Counter[str]()
    player, seen = Player(scheduler, {}, num_ahead=num_ahead), []

    def add(asked: Request) -> None:
        player.num_calls[asked.id] = asked.num_calls
        scheduler.add(asked, 0.0)

    for tick in range(NUM_TICKS):
        while scheduler.batch.num_waiting < flood:
            number = numbers["batch"]
            numbers["batch"] += 1
            every = [None, 1][number % 2]
            add(batch(f"batch{number}", 1 + number % 2, 2 + number % 7, kind=number % 2, client="flood", preview_every=every))
        for number, arrival in enumerate(arrivals):
            asked = {key: value for key, value in arrival.items() if key not in ("tick", "dropped_after")}
            if arrival["tick"] == tick:
                add(request(f"r{number}", **asked))
            if arrival["dropped_after"] is not None and arrival["tick"] + arrival["dropped_after"] == tick:
                scheduler.drop(f"r{number}")
        positions = [one for one in scheduler.positions() if not one[0].startswith("batch")]
        seen.append([others_in(player.turn()), positions, scheduler.num_waiting, scheduler.queued_work_s])
    return seen


@settings(max_examples=60, deadline=None)
@given(ARRIVALS, strategies.integers(1, 4), strategies.integers(1, 6), strategies.booleans(), strategies.integers(0, 1))
def test_with_any_flood_all_others_make_the_same_turns_as_without(arrivals, max_slots, flood, has_buckets, num_ahead):
    """So each of them is delayed by at most the turn that runs when it arrives, and the one that is prepared."""
    shapes = buckets(1, 2, 4) if has_buckets else ()
    for arrival in arrivals if num_ahead else ():
        arrival["num_calls"] = max(3, arrival["num_calls"])  # else a picture of the flood may still be in the decoder
    alone = run(arrivals, max_slots=max_slots, flood=0, shapes=shapes, num_ahead=num_ahead)
    assert run(arrivals, max_slots=max_slots, flood=flood, shapes=shapes, num_ahead=num_ahead) == alone


def test_a_batch_sample_keeps_its_slot_and_its_steps_while_others_run():
    scheduler = scheduler_of(2)
    player = Player(scheduler, {"batch": 5, "other": 3})
    scheduler.add(batch("batch", num_calls=5), 0.0)
    player.turn()
    scheduler.add(request("other", num_calls=3), 0.0)
    assert [player.turn().steps for _ in range(3)] == [(SampleId("other", 0),)] * 3
    assert player.steps == {SampleId("batch", 0): 1}
    assert player.turn().steps == (SampleId("batch", 0),)
    assert scheduler.batch.num_restarted == 0


def test_the_sample_with_the_fewest_steps_leaves_its_slot_and_starts_again_before_the_others():
    scheduler = scheduler_of(2)
    player = Player(scheduler, {"old": 9, "young": 9, "next": 9, "other": 2})
    scheduler.add(batch("old", num_calls=9), 0.0)
    player.turn()
    for name in ("young", "next"):
        scheduler.add(batch(name, num_calls=9), 0.0)
    player.turn()
    scheduler.add(request("other"), 0.0)
    plan = player.turn()
    assert plan.leaves == (SampleId("young", 0),) and plan.steps == (SampleId("other", 0),)
    player.turn()
    assert [sample.id for sample in player.turn().joins] == [SampleId("young", 0)]
    assert scheduler.batch.num_restarted == 1


def test_padding_is_filled_with_the_most_advanced_samples_and_no_further():
    scheduler = scheduler_of(8, buckets=buckets(1, 2, 4, 8))
    calls = {"old": 9, "young": 9, "other": 9}
    player = Player(scheduler, calls)
    scheduler.add(batch("old", num_calls=9), 0.0)
    player.turn()
    scheduler.add(batch("young", 2, num_calls=9), 0.0)
    player.turn()
    scheduler.add(request("other", 3, num_calls=9), 0.0)
    plan = player.turn()
    assert len(plan.steps) == 4 and plan.steps[3] == SampleId("old", 0)
    for _ in range(7):
        plan = player.turn()
    assert plan.steps[3].request_id == "young", "the last call of an image is not for padding: it would have to be decoded"


def test_the_others_previews_are_not_put_off_by_those_of_samples_that_fill_padding():
    scheduler = scheduler_of(4, buckets=buckets(4))
    player = Player(scheduler, {"batch": 9, "other": 4})
    scheduler.add(batch("batch", 2, num_calls=9, preview_every=1), 0.0)
    assert player.turn().previews, "alone it shows them"
    scheduler.add(request("other", num_calls=4, preview_every=2), 0.0)
    plans = [player.turn() for _ in range(3)]
    assert [len(plan.steps) for plan in plans] == [3, 3, 3]
    assert [plan.previews for plan in plans] == [(), (SampleId("other", 0),), ()]


@pytest.mark.parametrize(("has_fixed_rows", "num_filling"), [(False, 2), (True, 1)])
def test_what_fills_padding_fits_into_the_bucket_that_the_engine_will_choose(has_fixed_rows, num_filling):
    """Of four samples and six rows, one guided sample leaves four rows; where rows are fixed, one of them for a second row."""
    shapes = (BatchShape(4, 6, 8, 8),)
    scheduler = scheduler_of(4, buckets=shapes, has_fixed_rows=has_fixed_rows)
    player = Player(scheduler, {"batch": 9, "other": 4})
    scheduler.add(batch("batch", 3, num_calls=9, guidance=3.0), 0.0)
    player.turn()
    scheduler.add(request("other", num_calls=4), 0.0)
    assert len(player.turn().steps) == 1 + num_filling


def test_no_batch_sample_steps_while_the_picture_of_another_is_decoded():
    scheduler = scheduler_of(2)
    player = Player(scheduler, {"other": 1, "batch": 9})
    scheduler.add(request("other", num_calls=1), 0.0)
    scheduler.add(batch("batch", num_calls=9), 0.0)
    plan = scheduler.plan()
    assert plan.decodes == (SampleId("other", 0),)
    assert scheduler.plan() is None, "its picture has not come"
    scheduler.advance(player.answer(plan), 1.0)
    assert player.turn().steps == (SampleId("batch", 0),)


def test_batch_pictures_do_not_fill_the_decoder():
    scheduler = scheduler_of(8, max_decodes=2)
    player = Player(scheduler, {"batch": 1, "long": 3})
    scheduler.add(batch("batch", 6, num_calls=1), 0.0)
    scheduler.add(batch("long", 1, num_calls=3), 0.0)
    plans = [scheduler.plan() for _ in range(2)]
    assert [len(plan.decodes) for plan in plans] == [2, 0], "two pictures are in the decoder"
    assert plans[1].steps == (SampleId("long", 0),)
    for plan in plans:
        scheduler.advance(player.answer(plan), 1.0)
    assert len(player.turn().decodes) == 2


def test_where_no_sample_of_one_key_may_end_those_of_another_step():
    scheduler = scheduler_of(4, max_decodes=1)
    scheduler.add(batch("ends", 2, num_calls=1), 0.0)
    scheduler.add(batch("goes on", 1, num_calls=9, kind=1), 0.0)
    turns = [[sample_id.request_id for sample_id in scheduler.plan().steps] for _ in range(3)]
    assert turns == [["ends"], ["goes on"], ["goes on"]]


def test_a_sample_that_leaves_in_a_turn_that_is_prepared_starts_again_though_its_last_step_was_under_way():
    scheduler = scheduler_of(1)
    player = Player(scheduler, {"batch": 3, "other": 1}, num_ahead=1)
    scheduler.add(batch("batch", num_calls=3), 0.0)
    player.turn()
    scheduler.add(request("other", num_calls=1), 0.0)
    plan = player.turn()
    assert plan.leaves == (SampleId("batch", 0),) and plan.steps == (SampleId("other", 0),)
    player.play_to_the_end()
    assert player.joined.count(SampleId("batch", 0)) == 2
    assert not player.steps and scheduler.num_running == scheduler.batch.num_waiting == 0


def test_without_anyone_else_batch_samples_fill_all_slots_and_more_never_end_than_are_decoded():
    scheduler = scheduler_of(8, max_decodes=2)
    player = Player(scheduler, {"batch": 3})
    scheduler.add(batch("batch", 8, num_calls=3), 0.0)
    plans = [player.turn() for _ in range(6)]
    assert [len(plan.steps) for plan in plans] == [8, 8, 2, 2, 2, 2]
    assert [len(plan.decodes) for plan in plans] == [0, 0, 2, 2, 2, 2]
    assert scheduler.plan() is None


# ---- the share ---------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    max_slots=strategies.integers(1, 4),
    share=strategies.sampled_from([0.05, 0.1, 0.5]),
    calls=strategies.integers(1, 3),
    size=strategies.sampled_from([(64, 64), (64, 128)]),
    num_ahead=strategies.integers(0, 1),
)
def test_on_a_server_that_is_never_idle_batch_work_gets_its_share(max_slots, share, calls, size, num_ahead):
    scheduler = scheduler_of(max_slots, batch_share=share)
    player, done, work, number = Player(scheduler, {}, num_ahead=num_ahead), Counter[bool](), Counter[bool](), 0
    for _ in range(300):
        while scheduler.num_waiting < 2 or scheduler.batch.num_waiting < 2:
            is_batch = scheduler.num_waiting >= 2
            name = f"{'batch' if is_batch else 'other'}{(number := number + 1)}"
            player.num_calls[name] = calls
            scheduler.add(batch(name, num_calls=calls, size=size) if is_batch else request(name, num_calls=calls), 0.0)
        if (plan := player.turn()) is None:
            continue  # the decoder is full
        for sample_id in plan.steps:
            work[sample_id.request_id.startswith("batch")] += 2 if size != (64, 64) else 1
        for sample_id in plan.decodes:
            done[sample_id.request_id.startswith("batch")] += 1
    assert done[True] >= 1, "batch work progresses"
    assert work[True] <= share / (1 - share) * work[False] + 2 * calls


def test_a_paid_sample_runs_to_its_end_and_its_payment_ends_when_nobody_else_runs():
    scheduler = scheduler_of(2, batch_share=0.5)
    player = Player(scheduler, {"batch": 4, "a": 30, "b": 9})
    scheduler.add(request("a", num_calls=30), 0.0)
    scheduler.add(batch("batch", num_calls=4), 0.0)
    assert sum(len(player.turn().joins) for _ in range(8)) == 2, "it is paid for after six turns"
    scheduler.drop("a")
    player.turn()
    made = player.steps[SampleId("batch", 0)]
    scheduler.add(request("b", num_calls=9), 0.0)
    player.turn()
    assert player.steps[SampleId("batch", 0)] == made, "it gives way again"


# ---- limits ------------------------------------------------------------------------------------------------------


def test_batch_requests_have_their_own_limit_and_leave_that_of_others_alone():
    scheduler = scheduler_of(1, max_waiting=3)
    scheduler.add(batch("first", 4), 0.0)
    with pytest.raises(QueueFullError):
        scheduler.add(batch("second", 1), 0.0)
    scheduler.add(request("other", 4), 0.0)


def test_a_flood_of_batch_work_refuses_no_deadline_and_is_no_queued_work():
    scheduler = scheduler_of(1, max_wait_s=10.0)
    player = Player(scheduler, {"other": 2, "batch": 100, "next": 2})
    scheduler.add(request("other"), 0.0)
    while player.turn():
        pass
    scheduler.add(batch("batch", 50, num_calls=100), 0.0)
    player.turn(elapsed_s=1000.0)
    assert scheduler.queued_work_s == 0
    position = scheduler.add(request("next", deadline=3.0), 0.0)
    assert (position.num_samples_ahead, position.estimated_wait_s) == (0, 0.0)


def test_a_batch_request_that_was_dropped_or_is_late_is_forgotten_wherever_it_was():
    scheduler = scheduler_of(1)
    player = Player(scheduler, {"batch": 9, "late": 9, "other": 2})
    scheduler.add(batch("batch", 2, num_calls=9), 0.0)
    scheduler.add(batch("late", num_calls=9, deadline=5.0), 0.0)
    player.turn()
    scheduler.add(request("other"), 0.0)
    player.turn()
    assert scheduler.batch.num_waiting == 3, "one of them has left its slot"
    assert scheduler.expire(6.0) == {"late"}
    scheduler.drop("batch")
    while player.turn():
        pass
    assert not player.steps and (scheduler.num_running, scheduler.batch.num_waiting) == (0, 0)

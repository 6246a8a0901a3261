"""The scheduler's promises, held against random arrivals, cancellations and progress."""

from __future__ import annotations

import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from mii_serve.errors import EngineError, QueueFullError
from mii_serve.scheduler import Scheduler
from mii_serve.types import GenerationParams, Picture, SampleId, SampleProgress

PICTURE = Picture(width=1, height=1, rgb=bytes(3), nsfw_content_detected=None)


def params(num_images: int = 1, num_steps: int = 2) -> GenerationParams:
    return GenerationParams(
        prompt="p",
        negative_prompt="",
        height=64,
        width=64,
        num_inference_steps=num_steps,
        guidance_scale=3.0,
        num_images_per_prompt=num_images,
        scheduler="pndm",
        seed=0,
    )


def test_a_full_queue_refuses_the_whole_request():
    scheduler = Scheduler(max_slots=1, max_waiting_samples=3)
    scheduler.add("first", params(2))
    with pytest.raises(QueueFullError):
        scheduler.add("second", params(3))
    assert scheduler.num_waiting == 2
    scheduler.add("third", params(2))


def test_nothing_to_do_is_no_plan():
    assert Scheduler(max_slots=1, max_waiting_samples=1).plan() is None


def test_a_dropped_request_is_out_of_the_next_plan():
    scheduler = Scheduler(max_slots=2, max_waiting_samples=9)
    scheduler.add("a", params(3))
    scheduler.add("b", params(1))
    scheduler.plan()
    scheduler.drop("a")
    plan = scheduler.plan()
    assert set(plan.leaves) == {SampleId("a", 0), SampleId("a", 1)}
    assert plan.steps == (SampleId("b", 0),)


class SchedulerMachine(RuleBasedStateMachine):
    """Plays caller and engine at once; the engine's own record is what the promises are checked against."""

    requests = Bundle("requests")
    max_slots, max_waiting = 3, 8

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler(max_slots=self.max_slots, max_waiting_samples=self.max_waiting)
        self.num_requests = 0
        self.wanted: dict[SampleId, int] = {}  # samples not finished and not dropped, and the steps they need
        self.held: dict[SampleId, int] = {}  # what the engine holds, and the steps it has made
        self.arrivals: list[SampleId] = []

    @rule(target=requests, num_images=strategies.integers(1, 4), num_steps=strategies.integers(1, 5))
    def add(self, num_images, num_steps):
        request_id = f"r{self.num_requests}"
        self.num_requests += 1
        before = self.scheduler.num_waiting
        try:
            ahead = self.scheduler.add(request_id, params(num_images, num_steps))
        except QueueFullError:
            assert self.scheduler.num_waiting == before
            return multiple()
        assert ahead == before + self.scheduler.num_running
        for i in range(num_images):
            self.wanted[SampleId(request_id, i)] = num_steps
            self.arrivals.append(SampleId(request_id, i))
        return request_id

    @rule(request_id=consumes(requests))
    def drop(self, request_id):
        self.scheduler.drop(request_id)
        self.wanted = {s: n for s, n in self.wanted.items() if s.request_id != request_id}
        self.arrivals = [s for s in self.arrivals if s.request_id != request_id]

    @rule()
    def turn(self):
        plan = self.scheduler.plan()
        if plan is None:
            assert not self.wanted
            return
        for sample_id in plan.leaves:
            del self.held[sample_id]
        for sample in plan.joins:
            assert sample.id == self.arrivals.pop(0), "samples join in the order they came"
            assert sample.id not in self.held
            self.held[sample.id] = 0
        assert set(plan.steps) == set(self.held), "all that is held steps, nothing else does"
        assert len(plan.steps) == len(set(plan.steps)) <= self.max_slots
        assert len(plan.steps) == min(self.max_slots, len(self.wanted)), "no slot is left empty while somebody waits"
        progress = []
        for sample_id in plan.steps:
            self.held[sample_id] += 1
            is_last = self.held[sample_id] == self.wanted[sample_id]
            has_failed = is_last and self.wanted[sample_id] == 5  # every fifth kind of sample fails instead
            progress.append(
                SampleProgress(
                    id=sample_id,
                    step=self.held[sample_id],
                    num_steps=self.wanted[sample_id],
                    picture=PICTURE if is_last and not has_failed else None,
                    error=EngineError("told to fail") if has_failed else None,
                )
            )
            if is_last:
                del self.held[sample_id], self.wanted[sample_id]
        self.scheduler.advance(progress)

    @invariant()
    def counts_agree(self):
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.wanted)
        assert self.scheduler.num_waiting <= self.max_waiting + self.max_slots

    def teardown(self):
        for _ in range(200):
            self.turn()
        assert not self.wanted, "everything that was not dropped is finished in the end"
        assert not self.held


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase

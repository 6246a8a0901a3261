"""How many slots are found, on devices whose turns take what the test says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from player import params

from mii_serve.engine.batched.slot_search import MAX_SEARCH_S, NUM_SAMPLES, find_slots, knee, measure
from mii_serve.engine.turns import FinishedTurn, TurnResult
from mii_serve.types import SampleId, StepPlan


class Device:
    """Takes `turn_s` of the number of samples for a turn."""

    def __init__(self, turn_s: Callable[[int], float]) -> None:
        self._turn_s = turn_s
        self.held: set[SampleId] = set()
        self.spent_s = 0.0

    def launch(self, plan: StepPlan) -> FinishedTurn:
        self.held |= {sample.id for sample in plan.joins}
        assert self.held >= set(plan.steps)
        self.held -= set(plan.leaves)
        elapsed_s = self._turn_s(len(plan.steps)) if plan.steps else 0.0
        self.spent_s += elapsed_s
        return FinishedTurn(TurnResult(progress=(), started_at=0.0, elapsed_s=elapsed_s, stages={}))


@pytest.mark.parametrize(
    ("fixed_ms", "each_ms", "slots"),
    [(0.0, 5.0, 1), (5.0, 0.1, 16), (0.2, 3.0, 2)],
    ids=["compute bound", "launch bound", "in between"],
)
def test_the_fewest_samples_within_three_percent_of_the_best(fixed_ms, each_ms, slots):
    device = Device(lambda count: (fixed_ms + each_ms * count) / 1e3)
    assert find_slots(device, params(), otherwise=99) == slots
    assert not device.held, "nothing is left behind"


@given(st.dictionaries(st.integers(1, 64), st.floats(0.01, 1e4), min_size=1))
def test_the_knee_is_good_enough_and_no_smaller_number_is(rates):
    found, best = knee(rates), max(rates.values())
    assert rates[found] >= 0.97 * best
    assert all(rate < 0.97 * best for count, rate in rates.items() if count < found)


def test_a_disturbed_turn_does_not_count():
    seen: list[int] = []

    def turn_s(count: int) -> float:
        seen.append(count)
        return 0.5 if (count == 2 and seen.count(2) == 1) else 1e-3 * count

    assert measure(Device(turn_s), params())[2] == pytest.approx(1e3)


def test_a_slow_machine_does_not_look_for_long():
    device = Device(lambda count: 20.0 * count)
    assert find_slots(device, params(), otherwise=8) == 8
    assert device.spent_s == 20.0, "one turn"
    device = Device(lambda count: 0.05 * count)
    find_slots(device, params(), otherwise=8)
    assert device.spent_s <= MAX_SEARCH_S


def test_the_first_round_decides_where_time_suffices_for_no_more():
    device = Device(lambda count: 0.03 * count)
    assert set(measure(device, params())) == set(NUM_SAMPLES)
    assert find_slots(device, params(), otherwise=99) == 1

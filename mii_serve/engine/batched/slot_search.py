"""How many samples at once are worth it on this machine: measured at warm-up.

With more samples in a UNet call each of them waits longer, and from some number on hardly more images are made in a second. The
number of slots is that knee: the fewest samples within 3 % of the most images a second.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from mii_serve.engine.turns import Turn
from mii_serve.engine.warmup import input_image_of
from mii_serve.types import GenerationParams, Sample, SampleId, StepPlan

logger = logging.getLogger(__name__)

NUM_SAMPLES = (1, 2, 4, 6, 8, 12, 16)
GOOD_ENOUGH = 0.97
"""Of the most images a second."""
NUM_ROUNDS = 3
"""The shortest turn of each number counts: what else the machine does only makes turns longer."""
MAX_SEARCH_S = 2.0
"""For all turns of the search; the first takes what it takes."""


class Launching(Protocol):
    def launch(self, plan: StepPlan) -> Turn: ...


def knee(calls_per_s: Mapping[int, float]) -> int:
    """The fewest samples that are good enough, of sample calls a second by the number of samples."""
    return min(count for count, rate in calls_per_s.items() if rate >= GOOD_ENOUGH * max(calls_per_s.values()))


def find_slots(engine: Launching, params: GenerationParams, *, otherwise: int) -> int:
    """The knee for samples of these parameters; `otherwise` where the machine is too slow to look for it."""
    calls_per_s = measure(engine, params)
    if len(calls_per_s) < len(NUM_SAMPLES):
        logger.info("slots: %d, as not all numbers of samples could be tried in %g s", otherwise, MAX_SEARCH_S)
        return otherwise
    found = knee(calls_per_s)
    rates = ", ".join(f"{count}: {rate:.3g}" for count, rate in calls_per_s.items())
    logger.info("slots: %d, of samples and UNet calls of a sample a second: %s", found, rates)
    return found


def measure(engine: Launching, params: GenerationParams) -> dict[int, float]:
    """Sample calls a second by the number of samples, as far as the time suffices for one round."""
    shortest_s: dict[int, float] = {}
    spent_s, before = 0.0, 0
    for round_number in range(NUM_ROUNDS):
        for count in NUM_SAMPLES:
            expected_s = shortest_s.get(count, shortest_s.get(before, 0.0) * count / max(1, before))
            if spent_s + expected_s > MAX_SEARCH_S:
                return _rates(shortest_s)
            ids = [SampleId(f"slots-{round_number}", i) for i in range(count)]
            image = input_image_of(params)
            elapsed_s = _turn_s(engine, [Sample(id=each, params=params, input_image=image) for each in ids])
            shortest_s[count] = min(shortest_s.get(count, elapsed_s), elapsed_s)
            spent_s, before = spent_s + elapsed_s, count
    return _rates(shortest_s)


def _turn_s(engine: Launching, samples: Sequence[Sample]) -> float:
    ids = tuple(sample.id for sample in samples)
    engine.launch(StepPlan(joins=tuple(samples))).wait()
    elapsed_s = engine.launch(StepPlan(steps=ids)).wait().elapsed_s
    engine.launch(StepPlan(leaves=ids)).wait()
    return elapsed_s


def _rates(turns_s: Mapping[int, float]) -> dict[int, float]:
    return {count: count / max(turn_s, 1e-9) for count, turn_s in turns_s.items()}

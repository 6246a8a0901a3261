"""Turns one after the other on an engine: while one runs on the device, exactly one more is prepared.

A GPU takes work long before it does it. Without a bound the host would be many turns ahead of the device: a sample that joins
would wait for all of them, and the host's clock would say nothing about the device. With no turn prepared the device would be
idle between two turns. So the host launches turn k + 1 while turn k runs, and then waits for turn k.

An engine that computes in its own thread, as on a CPU, is done with a turn when `run` returns; then nothing is prepared ahead.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from mii_serve.engine import Engine
from mii_serve.types import GenerationParams, InputImage, SampleProgress, StepPlan

MAX_IN_FLIGHT = 2
"""One turn that runs, and one that is prepared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnResult:
    """What a turn achieved, or pictures and previews that were decoded beside the turns since.

    `started_at` is on `time.monotonic`; `elapsed_s` is the device's time, not the host's. `stages` are seconds by stage, see
    `stage_timer.STAGES`. `is_turn` is False for what was decoded beside the turns: its samples have made no step in it.
    """

    progress: tuple[SampleProgress, ...]
    started_at: float
    elapsed_s: float
    stages: Mapping[str, float]
    is_turn: bool = True


class Turn(Protocol):
    """A turn that was launched."""

    def is_done(self) -> bool:
        """Whether `wait` returns at once."""
        ...

    def wait(self) -> TurnResult:
        """Wait for the device. Called once.

        Raises:
            EngineError: as `Engine.run`.
        """
        ...


@runtime_checkable
class LaunchingEngine(Protocol):
    """What an `Engine` offers in addition whose device works while the host goes on.

    All but `on_decoded` and `has_decoded` is for the engine's own thread.
    """

    on_decoded: Callable[[], None]
    """Called in any thread when `has_decoded` has become true."""

    def launch(self, plan: StepPlan) -> Turn:
        """Begin a turn, without waiting for the device. What `plan.decodes` and `plan.previews` come to may be in the turn's
        result, or come later from `take_decoded`. A sample that has failed meanwhile is left out until `plan.leaves` names it.

        Raises:
            EngineError: as `Engine.run`.
        """
        ...

    def has_decoded(self) -> bool:
        """Whether `take_decoded` has something to do."""
        ...

    def take_decoded(self) -> list[TurnResult]:
        """Go on with decoding where it needs this thread, at most by one batch, and return what is finished.

        Raises:
            EngineError: as `Engine.run`.
        """
        ...


@runtime_checkable
class EncodingEngine(Protocol):
    """What an `Engine` offers in addition that encodes images before their samples join."""

    @property
    def encodes_beside(self) -> bool:
        """Whether `encode_image` may be called in another thread than the engine's, while turns run."""
        ...

    def encode_image(self, params: GenerationParams, image: InputImage) -> object:
        """What `Sample.encoded_image` of every sample of the request is to be.

        Raises:
            EngineError: it could not be encoded.
        """
        ...


class Turns:
    """Used by the engine's thread, or while that is idle."""

    def __init__(self, engine: Engine, on_decoded: Callable[[], None]) -> None:
        """`on_decoded` is called in any thread when `is_idle` has become false by itself."""
        self._engine = engine
        self._launching = engine if isinstance(engine, LaunchingEngine) else None
        if self._launching is not None:
            self._launching.on_decoded = on_decoded
        self._in_flight: deque[Turn] = deque()

    @property
    def is_idle(self) -> bool:
        """Whether `step` has nothing to do without a plan."""
        return not self._in_flight and not (self._launching is not None and self._launching.has_decoded())

    def step(self, plan: StepPlan | None) -> list[TurnResult]:
        """Launch a turn, and return what has ended; waits for the turn before it where that still runs.

        Without a plan it waits for the turn that runs, if one does.

        Raises:
            EngineError: as `Engine.run`.
        """
        if plan is not None:
            self._in_flight.append(self._launch(plan))
        results: list[TurnResult] = []
        while self._in_flight and self._must_wait(has_plan=plan is not None, has_results=bool(results)):
            results.append(self._in_flight.popleft().wait())
        if self._launching is not None and self._launching.has_decoded():
            results += self._launching.take_decoded()
        return results

    def _must_wait(self, *, has_plan: bool, has_results: bool) -> bool:
        is_full = len(self._in_flight) == MAX_IN_FLIGHT
        return is_full or self._in_flight[0].is_done() or not (has_plan or has_results)

    def _launch(self, plan: StepPlan) -> Turn:
        return _run(self._engine, plan) if self._launching is None else self._launching.launch(plan)


@dataclass(frozen=True, slots=True)
class FinishedTurn:
    """Implements `Turn` for one that has ended."""

    result: TurnResult

    def is_done(self) -> bool:
        return True

    def wait(self) -> TurnResult:
        return self.result


def _run(engine: Engine, plan: StepPlan) -> FinishedTurn:
    started_at, start = time.monotonic(), time.perf_counter()
    progress = engine.run(plan)
    elapsed_s = time.perf_counter() - start
    return FinishedTurn(
        TurnResult(progress=progress, started_at=started_at, elapsed_s=elapsed_s, stages=engine.stage_seconds())
    )

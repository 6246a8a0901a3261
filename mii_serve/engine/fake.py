"""An engine without a model, for tests of everything around engines. Its pictures are flat colours drawn from the seed."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass

from mii_serve.errors import EngineError, InvalidRequestError
from mii_serve.types import (
    Capabilities,
    EngineCapacity,
    EngineDescription,
    GenerationDefaults,
    GenerationParams,
    Limits,
    Picture,
    Sample,
    SampleId,
    SampleProgress,
    StepPlan,
)

FORBIDDEN_WORD = "skull"
"""A prompt with this word gets a black picture with the flag set."""


@dataclass(slots=True)
class _Running:
    sample: Sample
    step: int = 0


class FakeEngine:
    """Implements `mii_serve.engine.Engine`; one step of a sample is one count, no arithmetic.

    `gate` holds every turn back while it is cleared. After `fail_next`, the next turn raises `EngineError`.
    """

    def __init__(self, *, max_slots: int = 1) -> None:
        self._max_slots = max_slots
        self._running: dict[SampleId, _Running] = {}
        self._fails_next = False
        self._fails_sample: str | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.plans: list[StepPlan] = []

    @property
    def description(self) -> EngineDescription:
        return EngineDescription(
            engine="fake", dtype="fp32", device="cpu", model="fake", model_revision="0", has_safety_checker=True
        )

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            limits=Limits(),
            defaults=GenerationDefaults(scheduler="pndm", num_inference_steps=4, height=64, width=64),
            schedulers={"pndm": "pndm", "PNDMScheduler": "pndm", "lcm": "lcm"},
        )

    def fail_next(self) -> None:
        self._fails_next = True

    def fail_sample_of(self, request_id: str) -> None:
        """Let the next step of this request's samples fail by itself."""
        self._fails_sample = request_id

    def check(self, params: GenerationParams) -> None:
        if params.scheduler == "lcm" and params.num_inference_steps > 50:
            raise InvalidRequestError("num_inference_steps", "the scheduler lcm refuses it")

    def warmup(self) -> EngineCapacity:
        return EngineCapacity(max_slots=self._max_slots)

    def run(self, plan: StepPlan) -> tuple[SampleProgress, ...]:
        self.gate.wait()
        self.plans.append(plan)
        if self._fails_next:
            raise EngineError("told to fail")
        for sample_id in plan.leaves:
            self._running.pop(sample_id, None)
        for sample in plan.joins:
            self._running[sample.id] = _Running(sample)
        return tuple(self._step(self._running[sample_id]) for sample_id in plan.steps)

    def close(self) -> None:
        self._running.clear()

    def _step(self, running: _Running) -> SampleProgress:
        sample, num_steps = running.sample, running.sample.params.num_inference_steps
        if sample.id.request_id == self._fails_sample:
            del self._running[sample.id]
            return SampleProgress(id=sample.id, step=running.step, num_steps=num_steps, error=EngineError("told to fail"))
        running.step += 1
        is_last = running.step == num_steps
        if is_last:
            del self._running[sample.id]
        picture = _flat_picture(sample) if is_last else None
        return SampleProgress(id=sample.id, step=running.step, num_steps=num_steps, picture=picture)


def _flat_picture(sample: Sample) -> Picture:
    params = sample.params
    is_forbidden = FORBIDDEN_WORD in params.prompt
    color = bytes(3) if is_forbidden else random.Random(sample.seed).randbytes(3)
    rgb = color * (params.width * params.height)
    return Picture(width=params.width, height=params.height, rgb=rgb, nsfw_content_detected=is_forbidden)

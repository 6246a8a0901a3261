"""An engine without a model, for tests of everything around engines. Its pictures are flat colours drawn from the seed."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, replace

from mii_serve.engine.stage_timer import StageTimer
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
    SchedulerDescription,
    StepPlan,
)

FORBIDDEN_WORD = "skull"
"""A prompt with this word gets a black picture with the flag set."""
MAX_WORDS = 75
"""Words of a text beyond these are not used, as a text encoder has room for so many tokens."""


@dataclass(slots=True)
class FakeSample:
    sample: Sample
    step: int = 0


class FakeEngine:
    """Implements `mii_serve.engine.Engine`; one step of a sample is one count, no arithmetic.

    `gate` holds every turn back while it is cleared. After `fail_next`, the next turn raises `EngineError`.
    """

    num_graph_misses = 0

    def __init__(self, *, max_slots: int = 1, max_decodes: int = 4) -> None:
        self._capacity = EngineCapacity(max_slots=max_slots, max_decodes=max_decodes)
        self._running: dict[SampleId, FakeSample] = {}
        self._clock = StageTimer()
        self._fails_next = False
        self._fails_sample: str | None = None
        self._failed: set[SampleId] = set()  # a turn with them may have been planned before
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

    @property
    def capacity(self) -> EngineCapacity:
        return self._capacity

    def fail_next(self) -> None:
        self._fails_next = True

    def fail_sample_of(self, request_id: str) -> None:
        """Let the next step of the samples of what a caller calls so fail by itself."""
        self._fails_sample = request_id

    def stage_seconds(self) -> dict[str, float]:
        return self._clock.take()

    def check(self, params: GenerationParams) -> int:
        if params.scheduler == "lcm" and params.num_inference_steps > 50:
            raise InvalidRequestError("num_inference_steps", "the scheduler lcm refuses it")
        return params.num_steps

    def describe_scheduler(self, params: GenerationParams) -> SchedulerDescription:
        return SchedulerDescription(class_name="PNDMScheduler", options={"skip_prk_steps": "true"}, is_compiled=True)

    def warmup(self) -> None:
        pass

    def run(self, plan: StepPlan) -> tuple[SampleProgress, ...]:
        self.gate.wait()
        self.plans.append(plan)
        if self._fails_next:
            raise EngineError("told to fail")
        for sample_id in plan.leaves:
            self._running.pop(sample_id, None)
        for sample in plan.joins:
            self._running[sample.id] = FakeSample(sample)
        with self._clock.time("denoise"):
            able = [sample_id for sample_id in plan.steps if sample_id not in self._failed]
            made = {sample_id: self._step(self._running[sample_id], sample_id in plan.previews) for sample_id in able}
        for sample_id in plan.decodes:
            if (running := self._running.pop(sample_id, None)) is not None:
                made[sample_id] = replace(_progress(running), picture=_flat_picture(running.sample))
        return tuple(made.values())

    def close(self) -> None:
        self._running.clear()

    def _step(self, running: FakeSample, is_shown: bool) -> SampleProgress:
        sample = running.sample
        if self._fails_sample in (sample.id.request_id, sample.id.request_id.rpartition(" ")[0]):
            del self._running[sample.id]
            self._failed.add(sample.id)
            return replace(_progress(running), error=EngineError("told to fail"))
        running.step += 1
        return replace(_progress(running), preview=_flat_picture(sample) if is_shown else None)


def _progress(running: FakeSample) -> SampleProgress:
    return SampleProgress(id=running.sample.id, step=running.step, num_steps=running.sample.params.num_steps)


def _flat_picture(sample: Sample) -> Picture:
    params = sample.params
    is_forbidden = FORBIDDEN_WORD in params.prompt
    color = bytes(3) if is_forbidden else random.Random(sample.seed).randbytes(3)
    rgb = color * (params.width * params.height)
    return Picture(
        width=params.width,
        height=params.height,
        rgb=rgb,
        nsfw_content_detected=is_forbidden,
        dropped_prompt=_dropped(params.prompt),
        dropped_negative_prompt=_dropped(params.negative_prompt),
    )


def _dropped(text: str) -> str:
    return " ".join(text.split()[MAX_WORDS:])

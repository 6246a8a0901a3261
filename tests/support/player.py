"""Requests for a scheduler, and a player of the engine's part."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from mii_serve.errors import EngineError
from mii_serve.scheduler import Scheduler
from mii_serve.types import (
    BatchKey,
    BatchShape,
    EngineCapacity,
    GenerationParams,
    Picture,
    Request,
    SampleId,
    SampleProgress,
    StepPlan,
)

PICTURE = Picture(width=1, height=1, rgb=bytes(3), nsfw_content_detected=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyedParams(GenerationParams):
    """Samples of one latent shape that may not share a UNet call, as parameters to come will make them."""

    kind: int = 0

    @property
    def batch_key(self) -> BatchKey:
        return (*self.latent_shape, self.kind)


def params(num_images: int = 1, guidance: float = 3.0, size: tuple[int, int] = (64, 64), kind: int = 0) -> GenerationParams:
    return KeyedParams(
        kind=kind,
        prompt="p",
        negative_prompt="",
        height=size[0],
        width=size[1],
        num_inference_steps=1,
        guidance_scale=guidance,
        num_images_per_prompt=num_images,
        scheduler="pndm",
        seed=0,
    )


def request(name: str, num_images: int = 1, num_calls: int = 2, **more) -> Request:
    shape = {key: more.pop(key) for key in ("guidance", "size", "kind") if key in more}
    return Request(id=name, params=params(num_images, **shape), num_calls=num_calls, **more)


def scheduler_of(
    max_slots: int = 1,
    *,
    max_decodes: int = 4,
    max_waiting: int = 10_000,
    max_wait_s: float = 1e9,
    batch_share: float = 0.0,
    buckets: tuple[BatchShape, ...] = (),
    has_fixed_rows: bool = False,
) -> Scheduler:
    capacity = EngineCapacity(max_slots=max_slots, max_decodes=max_decodes, buckets=buckets, has_fixed_rows=has_fixed_rows)
    return Scheduler(capacity, max_waiting_samples=max_waiting, max_waiting_s=max_wait_s, batch_share=batch_share)


class Player:
    """Plays the engine: keeps its own record of what it was asked to do, and answers truthfully."""

    def __init__(self, scheduler: Scheduler, num_calls: dict[str, int], *, num_ahead: int = 0) -> None:
        """`num_ahead` turns are planned while one runs; the pictures of a turn come with it."""
        self.scheduler, self.num_calls = scheduler, num_calls
        self._num_ahead = num_ahead
        self._planned: deque[StepPlan] = deque()
        self.steps: dict[SampleId, int] = {}
        self.joined: list[SampleId] = []
        self.failed: set[SampleId] = set()

    def turn(self, elapsed_s: float = 1.0) -> StepPlan | None:
        """Plan a turn, and end the one that runs as soon as no more may be planned."""
        plan = self.scheduler.plan()
        if plan is not None:
            self._planned.append(plan)
        if self._planned and (plan is None or len(self._planned) > self._num_ahead):
            self.scheduler.advance(self.answer(self._planned.popleft()), elapsed_s)
        return plan

    def play_to_the_end(self) -> None:
        """Take turns until nothing runs and there is nothing to plan."""
        while self._planned or self.turn() is not None:
            self.turn()

    def answer(self, plan, failing: SampleId | None = None) -> list[SampleProgress]:
        for sample_id in plan.leaves:
            self.steps.pop(sample_id, None)  # it may have ended in the turn it was dropped in
        for sample in plan.joins:
            assert sample.id not in self.steps
            self.steps[sample.id] = 0
            self.joined.append(sample.id)
        made = {}
        for sample_id in plan.steps:
            if sample_id not in self.steps:
                assert sample_id in self.failed, "a turn that was planned before it failed"
                continue
            self.steps[sample_id] += 1
            error = EngineError("as the test asked") if sample_id == failing else None
            made[sample_id] = self.progress(sample_id, error=error)
            if error:
                self.failed.add(sample_id)
                del self.steps[sample_id]
        for sample_id in plan.decodes:
            if sample_id in self.steps:
                assert self.steps[sample_id] == self.num_calls[sample_id.request_id]
                made[sample_id] = self.progress(sample_id, picture=PICTURE)
                del self.steps[sample_id]
        return list(made.values())

    def progress(self, sample_id: SampleId, **more) -> SampleProgress:
        calls = self.num_calls[sample_id.request_id]
        return SampleProgress(id=sample_id, step=self.steps[sample_id], num_steps=calls, **more)

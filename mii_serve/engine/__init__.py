"""What runs a `StepPlan`: the FP32 reference, and in time faster kernel sets under the same three methods."""

from __future__ import annotations

from typing import Protocol

from mii_serve.types import (
    Capabilities,
    EngineCapacity,
    EngineDescription,
    GenerationParams,
    SampleProgress,
    StepPlan,
)


class Engine(Protocol):
    """A loaded model on a device, built, warmed and run by one and the same thread.

    Not only for safety: each thread that computes gets a pool of helpers of its own, and with two pools on the same cores
    torch's CPU kernels take twice as long.
    """

    @property
    def description(self) -> EngineDescription: ...

    @property
    def capabilities(self) -> Capabilities: ...

    def check(self, params: GenerationParams) -> None:
        """Refuse, before any work, what this model's schedulers cannot do. May be called from any thread, and may take a while.

        Raises:
            InvalidRequestError: naming the field and the rule.
        """
        ...

    def warmup(self) -> EngineCapacity:
        """Make one picture, so that "ready" means "has worked", and say how many samples fit at once."""
        ...

    def run(self, plan: StepPlan) -> tuple[SampleProgress, ...]:
        """Carry out one turn; the answer has one entry per sample of `plan.steps`, in that order.

        A sample that fails by itself ends with an error in its entry and costs nobody else anything.

        Raises:
            EngineError: the engine's state is unknown and everything it held is lost.
        """
        ...

    def close(self) -> None:
        """Free the device. The engine cannot be used afterwards."""
        ...

"""What runs a `StepPlan`: the FP32 reference, and in time faster kernel sets under the same three methods."""

from __future__ import annotations

from typing import Protocol

from mii_serve.types import (
    Capabilities,
    EngineCapacity,
    EngineDescription,
    GenerationParams,
    SampleProgress,
    SchedulerDescription,
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

    @property
    def capacity(self) -> EngineCapacity:
        """What fits at once; may shrink when a device turns out to have less memory than thought."""
        ...

    @property
    def num_graph_misses(self) -> int:
        """Turns that were made without a captured CUDA graph although there are some; 0 where there are none."""
        ...

    def stage_seconds(self) -> dict[str, float]:
        """Seconds that `run` has spent in each of `stages.STAGES` since this was last asked."""
        ...

    def check(self, params: GenerationParams) -> int:
        """The number of UNet calls each image takes. May be called from any thread, and may take a while.

        Raises:
            InvalidRequestError: this model's schedulers cannot do it; names the field and the rule.
        """
        ...

    def describe_scheduler(self, params: GenerationParams) -> SchedulerDescription:
        """What the scheduler of such a request is; of parameters that `check` has let pass."""
        ...

    def warmup(self) -> None:
        """Make a picture, so that "ready" means "has worked"."""
        ...

    def run(self, plan: StepPlan) -> tuple[SampleProgress, ...]:
        """Carry out one turn; the answer has one entry for each sample of `plan.steps` and `plan.decodes`, in that order.

        A sample that is in both has one entry. One that fails by itself ends with an error in its entry and costs nobody else
        anything.

        Raises:
            EngineError: the engine's state is unknown and everything it held is lost.
        """
        ...

    def close(self) -> None:
        """Free the device. The engine cannot be used afterwards."""
        ...

"""What runs a `StepPlan`: `reference`, plain FP32 diffusers, or `batched`, the fast loop over one of the `kernels`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mii_serve.types import (
    Capabilities,
    EngineCapacity,
    EngineDescription,
    GenerationParams,
    LoraInfo,
    SampleProgress,
    SchedulerDescription,
    StepPlan,
)

if TYPE_CHECKING:
    from mii_serve.models.loras import LoraAdapter


class Engine(Protocol):
    """A loaded model on a device. It is built, warmed up and run by one thread; only `check` may be called from others.

    Each thread that computes gets an OpenMP thread pool of its own, and with two pools on the same cores torch's CPU kernels
    take twice as long.
    """

    @property
    def description(self) -> EngineDescription: ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def capacity(self) -> EngineCapacity:
        """What fits at once; it shrinks when a call runs out of memory."""
        ...

    @property
    def num_graph_misses(self) -> int:
        """UNet calls for which no CUDA-graph bucket fitted; 0 where no buckets are declared."""
        ...

    def stage_seconds(self) -> dict[str, float]:
        """Seconds that `run` has spent in each of `stage_timer.STAGES` since the last call."""
        ...

    def check(self, params: GenerationParams) -> int:
        """The number of UNet calls each image takes. May be called from any thread, and may take a while.

        Raises:
            InvalidRequestError: this model's schedulers cannot do it; names the field and the rule.
        """
        ...

    def describe_scheduler(self, params: GenerationParams) -> SchedulerDescription:
        """The diffusers scheduler behind these parameters, which `check` has accepted."""
        ...

    def warmup(self) -> None:
        """Make a picture, so that "ready" means "has worked".

        Raises:
            EngineError: the engine failed, or its picture is not finite.
        """
        ...

    def run(self, plan: StepPlan) -> tuple[SampleProgress, ...]:
        """Run one turn. The result has one entry for each sample of `plan.steps` and `plan.decodes`, in that order.

        A sample that is in both has one entry. One that fails by itself has an error in its entry; the others are not affected.

        Raises:
            EngineError: the engine's state is unknown and all its samples are lost.
        """
        ...

    def close(self) -> None:
        """Free the device. The engine cannot be used afterwards."""
        ...


class Loras(Protocol):
    """How LoRAs come and go on an engine. `load` is for any thread, the others for the engine's own."""

    def load(self, name: str, path: Path) -> LoraAdapter:
        """
        Raises:
            ModelError: it cannot be read, is something else, or is for another model.
        """
        ...

    def add(self, adapter: LoraAdapter) -> LoraInfo:
        """Let requests name it; one of the same name before it is removed.

        Raises:
            ModelError: there is no memory for it.
        """
        ...

    def remove(self, name: str) -> None:
        """No new request can name it; unknown names are ignored."""
        ...

    def forget_unused(self, in_use: set[str]) -> None:
        """Forget what was removed, but for these revisions."""
        ...


@runtime_checkable
class LoraEngine(Protocol):
    """What an `Engine` offers in addition whose LoRAs can change while it runs; None where it computes none."""

    @property
    def loras(self) -> Loras | None: ...

"""What a sampler is asked to do for a request: all that its table, or its scheduler object, depends on."""

from __future__ import annotations

from dataclasses import dataclass

from mii_serve.types import GenerationParams


@dataclass(frozen=True, slots=True)
class SamplerRun:
    """A run of a sampler of `ModelSchedulers.accepted_names`, which leaves its first `num_skipped_steps` out.

    With `timesteps` or `sigmas` its steps are the request's own, as `retrieve_timesteps` of diffusers takes them, and
    `num_inference_steps` is their number. `eta` is what the scheduler's `step` takes by this name.
    """

    sampler: str
    num_inference_steps: int
    num_skipped_steps: int = 0
    eta: float = 0.0
    timesteps: tuple[int, ...] | None = None
    sigmas: tuple[float, ...] | None = None

    @classmethod
    def of(cls, params: GenerationParams) -> SamplerRun:
        return cls(
            sampler=params.scheduler,
            num_inference_steps=params.num_inference_steps,
            num_skipped_steps=params.num_skipped_steps,
            eta=params.eta,
            timesteps=params.timesteps,
            sigmas=params.sigmas,
        )

    @property
    def has_own_steps(self) -> bool:
        return self.timesteps is not None or self.sigmas is not None

    @property
    def is_one_of_many(self) -> bool:
        """Whether requests can ask for any number of runs like this one, so that few are asked for twice."""
        return self.has_own_steps or self.eta != 0

"""An engine's stages one by one, for `mii_serve verify`.

A probe computes with the weights, kernels, caches and captured graphs that `Engine.run` uses, and each stage is given its
input: a fault of one stage shows in that stage and not in the next. Only the engine's own thread may use it, and only while the
engine holds no samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from mii_serve.types import LatentShape


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UNetCall:
    """One sample of a UNet call, in float32 on the CPU: latents C × H × W, embedded prompts tokens × text width.

    Without `negative_prompt_embeds` the sample is not guided.
    """

    latents: torch.Tensor
    timestep: float
    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None
    guidance_scale: float

    @property
    def latent_shape(self) -> LatentShape:
        height, width = self.latents.shape[-2:]
        return height, width


class Probe(Protocol):
    """Takes and returns float32 tensors on the CPU, whatever it computes in. All inputs of one call are computed together."""

    @property
    def num_channels(self) -> int:
        """Of the latents."""
        ...

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """The embedded prompts, B × tokens × text width."""
        ...

    def predict(self, calls: Sequence[UNetCall]) -> torch.Tensor:
        """The predictions after guidance, N × C × H × W, of any number of calls of one latent shape."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1], N × 3 × height × width, from any number of latents N × C × H × W."""
        ...

    def without_checker(self) -> AbstractContextManager[None]:
        """Within it, `Engine.run` blackens no picture: two black pictures would be equal whatever is wrong."""
        ...


@runtime_checkable
class ProbedEngine(Protocol):
    """What an `Engine` must offer in addition to be verified."""

    def probe(self) -> Probe: ...


@contextlib.contextmanager
def without_checker(pipeline: Any) -> Iterator[None]:
    """Take the safety checker out of a diffusers pipeline, and put it back whatever happens."""
    checker, pipeline.safety_checker = pipeline.safety_checker, None
    try:
        yield
    finally:
        pipeline.safety_checker = checker

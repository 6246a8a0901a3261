"""How one sample goes from step to step: by the rows of a sampler table, or by a scheduler object of its own.

With a table the sampler's step is part of the batched turn, on the device. With an object the turn leaves the state alone,
and the object steps afterwards from what the UNet predicted; the sample shares the UNet call all the same.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mii_serve.samplers.build import step_kwargs
from mii_serve.samplers.preview import x0_coefficients
from mii_serve.samplers.table import INPUT_PLANES, STATE_PLANES, SamplerTable

Matrix = npt.NDArray[np.float32]

STAND_STILL = np.zeros((STATE_PLANES, INPUT_PLANES), np.float32)
"""Leaves nothing in a slot: for samples whose state is of no interest after the call, or is kept elsewhere."""


class Stepping(Protocol):
    """One sample's way through its UNet calls. `state` is the sample's slot, 5 × channels × height × width in float32."""

    @property
    def num_calls(self) -> int: ...

    @property
    def init_noise_sigma(self) -> float: ...

    def timestep(self, step: int) -> float: ...

    def before(self, step: int, state: torch.Tensor) -> tuple[float, Matrix, torch.Tensor | None]:
        """The scale of the UNet's input, the matrix of the turn's update, and its noise, channels × height × width."""
        ...

    def after(self, step: int, state: torch.Tensor, noise_pred: torch.Tensor) -> None:
        """Told what the UNet predicted after guidance, channels × height × width in float32."""
        ...

    def x0(self, step: int) -> list[float]:
        """The two coefficients of `samplers.update.estimate_x0`."""
        ...


class TableStepping:
    """Implements `Stepping` with the numbers of a table."""

    def __init__(self, table: SamplerTable, generator: torch.Generator) -> None:
        self._table = table
        self._generator = generator

    @property
    def num_calls(self) -> int:
        return self._table.num_calls

    @property
    def init_noise_sigma(self) -> float:
        return self._table.init_noise_sigma

    def timestep(self, step: int) -> float:
        return float(self._table.timesteps[step])

    def before(self, step: int, state: torch.Tensor) -> tuple[float, Matrix, torch.Tensor | None]:
        """Noise comes from the sample's own generator when its sampler draws, as diffusers draws it."""
        table = self._table
        noise = None
        if table.draws_noise[step]:
            noise = torch.randn((1, *state.shape[1:]), generator=self._generator)[0]
        return float(table.input_scale[step]), table.matrices[step], noise

    def after(self, step: int, state: torch.Tensor, noise_pred: torch.Tensor) -> None:
        pass

    def x0(self, step: int) -> list[float]:
        pair: list[float] = self._table.x0[step].tolist()
        return pair


class ObjectStepping:
    """Implements `Stepping` with a diffusers scheduler of its own."""

    def __init__(self, scheduler: Any, generator: torch.Generator) -> None:
        self._scheduler = scheduler
        self._times = scheduler.timesteps.tolist()  # read off the device once, not in every turn
        self._kwargs = step_kwargs(scheduler, generator)
        self._x0 = x0_coefficients(scheduler)
        self._latents: torch.Tensor | None = None

    @property
    def num_calls(self) -> int:
        return len(self._times)

    @property
    def init_noise_sigma(self) -> float:
        return float(self._scheduler.init_noise_sigma)

    def timestep(self, step: int) -> float:
        return float(self._times[step])

    def before(self, step: int, state: torch.Tensor) -> tuple[float, Matrix, torch.Tensor | None]:
        self._latents = state[:1].clone()
        state[:1] = self._scheduler.scale_model_input(self._latents, self._scheduler.timesteps[step])
        return 1.0, STAND_STILL, None

    def after(self, step: int, state: torch.Tensor, noise_pred: torch.Tensor) -> None:
        timestep = self._scheduler.timesteps[step]
        made = self._scheduler.step(noise_pred[None], timestep, self._latents, **self._kwargs, return_dict=False)
        state[:1] = made[0]

    def x0(self, step: int) -> list[float]:
        pair: list[float] = self._x0[step].tolist()
        return pair

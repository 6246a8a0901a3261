"""How one sample goes from step to step: by the rows of a sampler table, or by a scheduler object of its own.

With a table the sampler's update is part of the batched step, on the device. With an object the batched step leaves the state
as it is, and the object's `step` runs afterwards on the UNet's prediction; the sample shares the UNet call all the same.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mii_serve.samplers.build import first_call, noise_level, step_kwargs
from mii_serve.samplers.preview import x0_coefficients
from mii_serve.samplers.run import SamplerRun
from mii_serve.samplers.table import INPUT_PLANES, STATE_PLANES, SamplerTable

Matrix = npt.NDArray[np.float32]

NO_UPDATE = np.zeros((STATE_PLANES, INPUT_PLANES), np.float32)
"""Writes zeros to the slot: for samples whose state is not needed after the call, or is kept elsewhere."""


class Stepping(Protocol):
    """One sample's steps. `states[slot]` is the sample's, 5 × channels × height × width in float32 on the device; `step` counts
    UNet calls from 0.
    """

    reads_prediction: bool
    """Whether `after` has to be called."""

    @property
    def num_calls(self) -> int:
        """UNet calls of the whole run."""
        ...

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the noise that the run starts from."""
        ...

    def noise_level(self, step: int) -> tuple[float, float]:
        """The factors of an image's latents and of the noise that make its noisy latents before this step.

        After the last one, with `num_calls`, there is no noise.
        """
        ...

    def timestep(self, step: int) -> float:
        """The UNet's timestep in this step."""
        ...

    def before(self, step: int, states: torch.Tensor, slot: int) -> tuple[float, Matrix, torch.Tensor | None]:
        """The scale of the UNet's input, the update's matrix (5 × 7), and its noise (channels × height × width, on the CPU)."""
        ...

    def after(self, step: int, states: torch.Tensor, slot: int, noise_pred: torch.Tensor) -> None:
        """Take in the prediction after guidance, channels × height × width in float32."""
        ...

    def x0(self, step: int) -> list[float]:
        """The two coefficients of `samplers.update.estimate_x0`."""
        ...


class TableStepping:
    """Implements `Stepping` by a sampler table. `generator` is the sample's own, on the CPU."""

    reads_prediction = False

    def __init__(self, table: SamplerTable, generator: torch.Generator) -> None:
        self._table = table
        self._generator = generator

    @property
    def num_calls(self) -> int:
        return self._table.num_calls

    @property
    def init_noise_sigma(self) -> float:
        return self._table.init_noise_sigma

    def noise_level(self, step: int) -> tuple[float, float]:
        assert self._table.noise_levels is not None, "such requests are refused"
        return self._table.noise_levels[step]

    def timestep(self, step: int) -> float:
        return float(self._table.timesteps[step])

    def before(self, step: int, states: torch.Tensor, slot: int) -> tuple[float, Matrix, torch.Tensor | None]:
        """Noise is drawn from the sample's own generator in the steps in which diffusers draws it."""
        table = self._table
        noise = None
        if table.draws_noise[step]:
            noise = torch.randn((1, *states.shape[2:]), generator=self._generator)[0]
        return float(table.input_scale[step]), table.matrices[step], noise

    def after(self, step: int, states: torch.Tensor, slot: int, noise_pred: torch.Tensor) -> None:
        pass

    def x0(self, step: int) -> list[float]:
        pair: list[float] = self._table.x0[step].tolist()
        return pair


class ObjectStepping:
    """Implements `Stepping` by a diffusers scheduler that no other sample uses."""

    reads_prediction = True

    def __init__(self, scheduler: Any, generator: torch.Generator, run: SamplerRun) -> None:
        """`scheduler` is made for this `run`."""
        first = first_call(scheduler, run.num_skipped_steps)
        self._scheduler = scheduler
        self._scheduler_timesteps = scheduler.timesteps[first:]
        self._timesteps = self._scheduler_timesteps.tolist()  # read from the device once, not in every step
        self._kwargs = step_kwargs(scheduler, generator, run.eta)
        self._x0 = x0_coefficients(scheduler, first=first)
        self._latents: torch.Tensor | None = None

    @property
    def num_calls(self) -> int:
        return len(self._timesteps)

    @property
    def init_noise_sigma(self) -> float:
        return float(self._scheduler.init_noise_sigma)

    def noise_level(self, step: int) -> tuple[float, float]:
        if step == self.num_calls:
            return 1.0, 0.0
        return noise_level(self._scheduler, self._scheduler_timesteps[step])

    def timestep(self, step: int) -> float:
        return float(self._timesteps[step])

    def before(self, step: int, states: torch.Tensor, slot: int) -> tuple[float, Matrix, torch.Tensor | None]:
        latents = states[slot, :1]
        self._latents = latents.clone()
        latents[:] = self._scheduler.scale_model_input(self._latents, self._scheduler_timesteps[step])
        return 1.0, NO_UPDATE, None

    def after(self, step: int, states: torch.Tensor, slot: int, noise_pred: torch.Tensor) -> None:
        timestep = self._scheduler_timesteps[step]
        states[slot, :1] = self._scheduler.step(noise_pred[None], timestep, self._latents, **self._kwargs, return_dict=False)[0]

    def x0(self, step: int) -> list[float]:
        pair: list[float] = self._x0[step].tolist()
        return pair

"""Doubles of a device that runs the fused operations in other ways than torch, and of the clock that times them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_shape import TINY

from mii_serve.engine.kernels.fused.install import Device
from mii_serve.engine.kernels.fused.operations import TorchOperations
from mii_serve.engine.kernels.sampler import TorchSampler
from mii_serve.models import LoadedModel
from mii_serve.models.random_init import build_random_pipeline
from mii_serve.models.source import DEMO_FOLDER
from mii_serve.types import GenerationDefaults, Limits


class Clock:
    """Times a call by the way that it runs: each has a price, torch's is 1."""

    def __init__(self) -> None:
        self.price = 1.0

    def time_ms(self, call: Callable[[], object]) -> float:
        self.price = 1.0
        call()
        return self.price


class Way(TorchOperations):
    """Torch's, at another price; some operations wrong or failing."""

    def __init__(self, clock: Clock, price: float, *, wrong: str = "", failing: str = "") -> None:
        self._clock, self._price, self._wrong, self._failing = clock, price, wrong, failing
        self.calls: list[str] = []

    def _run(self, name: str, *arguments: Any, **named: Any) -> Any:
        self.calls.append(name)
        if name == self._failing:
            raise RuntimeError("PassManager::run failed\nmore")
        made = getattr(TorchOperations, name)(self, *arguments, **named)
        self._clock.price = self._price
        return made * 1.01 if name == self._wrong else made

    def group_norm(self, *arguments: Any, **named: Any) -> Any:
        return self._run("group_norm", *arguments, **named)

    def upsample(self, *arguments: Any, **named: Any) -> Any:
        return self._run("upsample", *arguments, **named)

    def layer_norm(self, *arguments: Any, **named: Any) -> Any:
        return self._run("layer_norm", *arguments, **named)

    def linear_geglu(self, *arguments: Any, **named: Any) -> Any:
        return self._run("linear_geglu", *arguments, **named)

    def attention(self, *arguments: Any, **named: Any) -> Any:
        return self._run("attention", *arguments, **named)


class Sampler(TorchSampler):
    """Torch's, at another price; wrong where asked for."""

    def __init__(self, clock: Clock, price: float, *, is_wrong: bool = False) -> None:
        self._clock, self._price, self._is_wrong = clock, price, is_wrong

    def end(self, *arguments: Any, **named: Any) -> Any:
        made = super().end(*arguments, **named)
        self._clock.price = self._price
        return made * 1.01 if self._is_wrong else made


def tiny_model() -> LoadedModel:
    pipeline = build_random_pipeline(
        TINY,
        tokenizer_folder=DEMO_FOLDER / "tokenizer",
        dtype=torch.float32,
        device=torch.device("cpu"),
        enable_safety_checker=False,
    )
    defaults = GenerationDefaults(scheduler="default", height=64, width=64)
    return LoadedModel(pipeline=pipeline, name="tiny", revision="", defaults=defaults, limits=Limits())


def fast_device(*, wrong: str = "", failing: str = "") -> tuple[Device, Way]:
    """A device with one way beside torch's, at half the price."""
    clock = Clock()
    way = Way(clock, 0.5, wrong=wrong, failing=failing)
    samplers = {"fast": Sampler(clock, 0.5, is_wrong=wrong == "sampler")}
    about = {"device": "double", "torch": "1"}
    return Device(about=about, ways={"fast": way}, samplers=samplers, time_ms=clock.time_ms), way

"""The diffusers scheduler objects a model runs by: its own, and those that a request names, built from the model's config.

Every one is as `StableDiffusionPipeline` would hold it: the pipeline repairs old configs (`steps_offset` becomes 1,
`clip_sample` False), and the pipeline's own code does it here too, so that a repair also reaches a scheduler a request names.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import json
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionPipeline

from mii_serve.errors import InvalidRequestError
from mii_serve.samplers.names import CLASS_NAMES, OTHER_NAMES, SAMPLERS, SamplerSpec
from mii_serve.types import DEFAULT_SCHEDULER, GenerationParams, SchedulerDescription

for _name in ("diffusers.schedulers", "diffusers.configuration_utils"):
    # They warn at every object that is made: a log line per request that no one can act on.
    logging.getLogger(_name).setLevel(logging.ERROR)

REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What diffusers' schedulers raise for a config or a number of steps they cannot work with."""


class ModelSchedulers:
    """Makes schedulers for one model. Safe to use from several threads."""

    def __init__(self, model_scheduler: Any) -> None:
        """`model_scheduler` is the scheduler of a loaded `StableDiffusionPipeline`; it is copied."""
        self._own = copy.deepcopy(model_scheduler)
        self._own_class = type(model_scheduler).__name__
        self._built: dict[str, Any] = {DEFAULT_SCHEDULER: self._own}
        self._described: dict[tuple[str, bool], SchedulerDescription] = {}
        self._lock = threading.Lock()
        self.accepted_names = self._accepted_names()

    @property
    def own_class(self) -> str:
        """The class of the model's own scheduler."""
        return self._own_class

    def make(self, name: str, num_inference_steps: int, device: torch.device, num_skipped_steps: int = 0) -> Any:
        """A fresh scheduler with its timesteps set. `name` is a value of `accepted_names`.

        With `num_skipped_steps` it begins after these, and its calls are those from `first_call` on.

        Raises:
            InvalidRequestError: this model's config allows no such scheduler, or it cannot make that many steps.
        """
        scheduler = copy.deepcopy(self._template(name))
        try:
            scheduler.set_timesteps(num_inference_steps, device=device)
        except REFUSALS as error:
            raise steps_refusal(name, num_inference_steps, first_line(error)) from error
        if hasattr(scheduler, "set_begin_index"):
            # With so many steps that timesteps repeat, it would otherwise look its first one up, find the second, and run out.
            scheduler.set_begin_index(first_call(scheduler, num_skipped_steps))
        return scheduler

    def describe(self, name: str, *, is_compiled: bool) -> SchedulerDescription:
        """What the name stands for: the class, and its settings that are not the class's defaults."""
        key = name, is_compiled
        if key not in self._described:
            template = self._template(name)
            self._described[key] = SchedulerDescription(
                class_name=type(template).__name__, options=_options(template), is_compiled=is_compiled
            )
        return self._described[key]

    def _template(self, name: str) -> Any:
        with self._lock:
            if name not in self._built:
                self._built[name] = self._build(name)
            return self._built[name]

    def _build(self, name: str) -> Any:
        spec = SAMPLERS.get(name) or SamplerSpec(name)
        cls = getattr(diffusers, spec.class_name, None)
        if cls is None:
            raise InvalidRequestError("scheduler", f"needs a diffusers that has {spec.class_name}", repr(name))
        if missing := missing_packages(cls):
            raise InvalidRequestError("scheduler", f"needs the package {' and '.join(missing)} on the server", repr(name))
        try:
            with _quiet():
                return repaired(cls.from_config(self._own.config, **spec.overrides))
        except REFUSALS as error:
            rule = f"must be one that this model's scheduler config allows ({first_line(error)})"
            raise InvalidRequestError("scheduler", rule, repr(name)) from error

    def _accepted_names(self) -> Mapping[str, str]:
        """Every accepted spelling, and the name that results use for it."""
        names = {DEFAULT_SCHEDULER: DEFAULT_SCHEDULER} | {name: name for name in SAMPLERS} | dict(OTHER_NAMES)
        for class_name in CLASS_NAMES:
            names[class_name] = names[class_name.lower()] = class_name
        names[self._own_class] = names[self._own_class.lower()] = DEFAULT_SCHEDULER
        return MappingProxyType(names)


def repaired(scheduler: Any) -> Any:
    """The scheduler as a pipeline holds it that was built with it."""
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"))
    with _quiet():
        return StableDiffusionPipeline(**nothing, scheduler=scheduler, requires_safety_checker=False).scheduler


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' notes on deprecated configs: repairing them is what is done here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def missing_packages(cls: Any) -> list[str]:
    """The packages a diffusers class needs and does not find: without them a stand-in is exported under its name."""
    if isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin):
        return []
    return [name for name in getattr(cls, "_backends", ()) if importlib.util.find_spec(name) is None]


def _options(scheduler: Any) -> Mapping[str, str]:
    parameters = inspect.signature(type(scheduler).__init__).parameters
    found = {
        name: json.dumps(value, default=str)
        for name, value in sorted(scheduler.config.items())
        if name in parameters and value != parameters[name].default
    }
    return MappingProxyType({name: value for name, value in found.items() if len(value) <= 80})


def step_kwargs(scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
    """What `StableDiffusionPipeline` hands to `step` of this scheduler beside the usual."""
    accepted = inspect.signature(scheduler.step).parameters
    offered = {"eta": 0.0, "generator": generator}
    return {name: value for name, value in offered.items() if name in accepted}


def first_call(scheduler: Any, num_skipped_steps: int) -> int:
    """The index in `scheduler.timesteps` of the call that a run begins with which leaves its first steps out.

    As `StableDiffusionImg2ImgPipeline.get_timesteps` counts: a scheduler of the second order makes two calls a step.
    """
    return num_skipped_steps * int(getattr(scheduler, "order", 1))


def noise_level(scheduler: Any, timestep: torch.Tensor) -> tuple[float, float]:
    """What the scheduler's `add_noise` multiplies an image's latents and the noise by at this timestep, in float32."""
    latents, noise = torch.eye(2, dtype=torch.float32, device=timestep.device).split(1)
    of_latents, of_noise = scheduler.add_noise(latents, noise, timestep.reshape(1))[0].tolist()
    return of_latents, of_noise


def refuse_without_noise(schedulers: ModelSchedulers, params: GenerationParams, *, has_blending: bool = True) -> None:
    """Raises:
    InvalidRequestError: the request's scheduler has to add noise to an image, and cannot. Without blending, one that repaints
        an image with strength 1 has not to.
    """
    if params.strength is None or (params.has_mask and params.strength == 1.0 and not has_blending):
        return
    scheduler = schedulers.make(params.scheduler, params.num_inference_steps, torch.device("cpu"), params.num_skipped_steps)
    try:
        noise_level(scheduler, scheduler.timesteps[first_call(scheduler, params.num_skipped_steps)])
    except REFUSALS as error:
        rule = f"must be one that can add noise to an image ({type(error).__name__}: {first_line(error)})"
        raise InvalidRequestError("scheduler", rule, repr(params.scheduler)) from error


def try_scheduler(schedulers: ModelSchedulers, name: str, num_inference_steps: int, num_skipped_steps: int = 0) -> int:
    """Count the UNet calls by running through them on tiny latents: some schedulers fail, or divide by zero, only on the way.

    PNDM with v1-4's `steps_offset` asks for a timestep beyond the last one when it makes 1000 steps; DPM-Solver++ gets the same
    timestep twice near there. It runs twice, because one that draws from another source than the request's generator would draw
    another picture each time. Takes about 80 microseconds a step.

    Raises:
        InvalidRequestError: the sampler cannot make that many steps, or not the same ones twice.
    """
    first, second = (_tried(schedulers, name, num_inference_steps, num_skipped_steps) for _ in range(2))
    if not torch.equal(first[0], second[0]):
        rule = "must draw its noise from the request's generator, or no seed would make a picture again"
        raise InvalidRequestError("scheduler", rule, repr(name))
    return first[1]


def _tried(
    schedulers: ModelSchedulers, name: str, num_inference_steps: int, num_skipped_steps: int
) -> tuple[torch.Tensor, int]:
    scheduler = schedulers.make(name, num_inference_steps, torch.device("cpu"), num_skipped_steps)
    timesteps = scheduler.timesteps[first_call(scheduler, num_skipped_steps) :]
    generator = torch.Generator().manual_seed(0)
    try:
        kwargs = step_kwargs(scheduler, generator)
        # Neither side is 1, which any other shape fits: some schedulers multiply latents by all noise levels at once.
        sample = torch.randn(1, 4, 2, 3, generator=generator) * scheduler.init_noise_sigma
        for timestep in timesteps:
            scheduler.scale_model_input(sample, timestep)
            model_output = torch.randn(sample.shape, generator=generator)
            sample = scheduler.step(model_output, timestep, sample, **kwargs, return_dict=False)[0]
    except REFUSALS as error:
        raise steps_refusal(name, num_inference_steps, f"{type(error).__name__} on the way: {first_line(error)}") from error
    if not sample.isfinite().all():
        raise steps_refusal(name, num_inference_steps, "its result would not be finite")
    return sample, len(timesteps)


def steps_refusal(name: str, num_inference_steps: int, reason: str) -> InvalidRequestError:
    rule = f"must be a number of steps that the scheduler {name} can make with this model ({reason})"
    return InvalidRequestError("num_inference_steps", rule, str(num_inference_steps))


def first_line(error: BaseException) -> str:
    """Enough of an error's text to put into another's."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]

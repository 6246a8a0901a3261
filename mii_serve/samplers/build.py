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
from mii_serve.samplers.run import SamplerRun
from mii_serve.types import DEFAULT_SCHEDULER, GenerationParams, SchedulerDescription, shown_list

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

    def make(self, run: SamplerRun, device: torch.device) -> Any:
        """A fresh scheduler with its timesteps set; its calls are those from `first_call` on.

        Raises:
            InvalidRequestError: this model's config allows no such scheduler, or it cannot make these steps.
        """
        scheduler = copy.deepcopy(self._template(run.sampler))
        _refuse_eta(scheduler, run)
        _set_steps(scheduler, run, device)
        if hasattr(scheduler, "set_begin_index"):
            # With so many steps that timesteps repeat, it would otherwise look its first one up, find the second, and run out.
            scheduler.set_begin_index(first_call(scheduler, run.num_skipped_steps))
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


def _set_steps(scheduler: Any, run: SamplerRun, device: torch.device) -> None:
    """As diffusers' `retrieve_timesteps` sets them."""
    try:
        if not run.has_own_steps:
            scheduler.set_timesteps(run.num_inference_steps, device=device)
            return
        name = "sigmas" if run.timesteps is None else "timesteps"
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise steps_refusal(run, f"{type(scheduler).__name__}.set_timesteps takes no {name}")
        scheduler.set_timesteps(**{name: list(getattr(run, name))}, device=device)
    except REFUSALS as error:
        raise steps_refusal(run, first_line(error)) from error
    order = int(getattr(scheduler, "order", 1))
    if order == 1 and len(scheduler.timesteps) != run.num_inference_steps:
        raise steps_refusal(run, f"it makes {len(scheduler.timesteps)} steps of these, not {run.num_inference_steps}")
    if order > 1 and run.num_skipped_steps:
        # Image-to-image in diffusers takes the calls for steps there, and would begin somewhere else, or nowhere.
        raise steps_refusal(run, "not together with strength, as it makes several calls a step")


def _refuse_eta(scheduler: Any, run: SamplerRun) -> None:
    """diffusers leaves it out without a word."""
    if run.eta and "eta" not in inspect.signature(scheduler.step).parameters:
        rule = f"must be 0 with the scheduler {run.sampler}: {type(scheduler).__name__} takes none, ddim and tcd do"
        raise InvalidRequestError("eta", rule, str(run.eta))


def step_kwargs(scheduler: Any, generator: torch.Generator, eta: float = 0.0) -> dict[str, Any]:
    """What `StableDiffusionPipeline` hands to `step` of this scheduler beside the usual."""
    accepted = inspect.signature(scheduler.step).parameters
    offered = {"eta": eta, "generator": generator}
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
    run = SamplerRun.of(params)
    scheduler = schedulers.make(run, torch.device("cpu"))
    try:
        noise_level(scheduler, scheduler.timesteps[first_call(scheduler, run.num_skipped_steps)])
    except REFUSALS as error:
        rule = f"must be one that can add noise to an image ({type(error).__name__}: {first_line(error)})"
        raise InvalidRequestError("scheduler", rule, repr(run.sampler)) from error


def try_scheduler(schedulers: ModelSchedulers, run: SamplerRun) -> int:
    """Count the UNet calls by running through them on tiny latents: some schedulers fail, or divide by zero, only on the way.

    PNDM with v1-4's `steps_offset` asks for a timestep beyond the last one when it makes 1000 steps; DPM-Solver++ gets the same
    timestep twice near there. It runs twice, because one that draws from another source than the request's generator would draw
    another picture each time. Takes about 80 microseconds a step.

    Raises:
        InvalidRequestError: the sampler cannot make these steps, or not the same ones twice.
    """
    first, second = (_tried(schedulers, run) for _ in range(2))
    if not torch.equal(first[0], second[0]):
        rule = "must draw its noise from the request's generator, or no seed would make a picture again"
        raise InvalidRequestError("scheduler", rule, repr(run.sampler))
    return first[1]


def _tried(schedulers: ModelSchedulers, run: SamplerRun) -> tuple[torch.Tensor, int]:
    scheduler = schedulers.make(run, torch.device("cpu"))
    timesteps = scheduler.timesteps[first_call(scheduler, run.num_skipped_steps) :]
    generator = torch.Generator().manual_seed(0)
    try:
        kwargs = step_kwargs(scheduler, generator, run.eta)
        # Neither side is 1, which any other shape fits: some schedulers multiply latents by all noise levels at once.
        sample = torch.randn(1, 4, 2, 3, generator=generator) * scheduler.init_noise_sigma
        for timestep in timesteps:
            scheduler.scale_model_input(sample, timestep)
            model_output = torch.randn(sample.shape, generator=generator)
            sample = scheduler.step(model_output, timestep, sample, **kwargs, return_dict=False)[0]
    except REFUSALS as error:
        raise steps_refusal(run, f"{type(error).__name__} on the way: {first_line(error)}") from error
    if not sample.isfinite().all():
        raise steps_refusal(run, "its result would not be finite")
    return sample, len(timesteps)


def steps_refusal(run: SamplerRun, reason: str) -> InvalidRequestError:
    """The scheduler cannot make the steps of this run: an error about the parameter that gives them."""
    if not run.has_own_steps:
        rule = f"must be a number of steps that the scheduler {run.sampler} can make with this model ({reason})"
        return InvalidRequestError("num_inference_steps", rule, str(run.num_inference_steps))
    name, values = ("timesteps", run.timesteps) if run.sigmas is None else ("sigmas", run.sigmas)
    rule = f"must be {name} that the scheduler {run.sampler} can make with this model ({reason})"
    return InvalidRequestError(name, rule, shown_list(values or ()))


def first_line(error: BaseException) -> str:
    """Enough of an error's text to put into another's."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]

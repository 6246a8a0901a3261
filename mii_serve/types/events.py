"""What happens to a request: the one family of events, from the replica's loop to the client, and the answer they add up to.

A request ends with exactly one `Done`, or with an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

from mii_serve.types.embeddings import EMBEDS
from mii_serve.types.params import GenerationParams
from mii_serve.types.request import ImageFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerDescription:
    """What a sampler's name stands for: the diffusers class, and its options that are not the class's defaults, as JSON.

    A compiled sampler steps by a table of numbers, another by a scheduler object of its own; the images are the same.
    """

    class_name: str
    options: Mapping[str, str]
    is_compiled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDescription:
    """The engine that runs, as every answer names it.

    `note` says why it is this engine where `auto` would have preferred another; empty when there is nothing to say.
    `num_ranks` devices compute each UNet call together; `parallelism` is what they split, empty with one. `devices` says which
    they are, one text for each rank. `kernels` says which fused kernels run and why others do not, empty where none could.
    """

    engine: str
    dtype: str
    device: str
    model: str
    model_revision: str
    has_safety_checker: bool
    note: str = ""
    kernels: str = ""
    num_ranks: int = 1
    parallelism: str = ""
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectiveParameters(GenerationParams):
    """What was really done, after defaults, and by what.

    `scheduler_class` is the diffusers class that `scheduler` stood for, `scheduler_options` its options that are not the
    class's defaults, as JSON. `is_scheduler_compiled` is False where a scheduler object stepped the samples, which takes
    longer. The dropped texts are what the text encoder had no room for, empty where it used all.
    """

    engine: str
    dtype: str
    device: str
    model: str
    model_revision: str
    dropped_prompt: str = field(repr=False)
    dropped_negative_prompt: str = field(repr=False)
    scheduler_class: str
    scheduler_options: Mapping[str, str]
    is_scheduler_compiled: bool
    has_prompt_embeds: bool = False
    """The prompt was embeddings, which are not repeated."""

    def as_record(self) -> dict[str, Any]:
        """By name, as plain values."""
        known = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "lora_choice"}
        return known | {"scheduler_options": dict(self.scheduler_options), "loras": dict(self.loras)}

    @classmethod
    def of(
        cls,
        params: GenerationParams,
        engine: EngineDescription,
        scheduler: SchedulerDescription,
        *,
        dropped_prompt: str = "",
        dropped_negative_prompt: str = "",
    ) -> EffectiveParameters:
        return cls(
            **{one.name: getattr(params, one.name) for one in fields(GenerationParams) if one.name not in EMBEDS},
            has_prompt_embeds=params.prompt_embeds is not None,
            engine=engine.engine,
            dtype=engine.dtype,
            device=engine.device,
            model=engine.model,
            model_revision=engine.model_revision,
            dropped_prompt=dropped_prompt,
            dropped_negative_prompt=dropped_negative_prompt,
            scheduler_class=scheduler.class_name,
            scheduler_options=dict(scheduler.options),
            is_scheduler_compiled=scheduler.is_compiled,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """The request waits: samples that start before its first one, and the estimated seconds until that one starts.

    Sent on acceptance, and again while it moves forward. There is no estimate before there is a measurement.
    """

    num_samples_ahead: int
    estimated_wait_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """An image has a slot."""

    image_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """An image has made `step` of its `num_steps` UNet calls; some schedulers make more than `num_inference_steps`.

    `estimated_left_s` is the measured time of its turns times the calls that are left.
    """

    image_index: int
    step: int
    num_steps: int
    estimated_left_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What an image would look like if it ended after `step` UNet calls; checked for safety like the finished one.

    `encoded` is a file of the `format`. `nsfw_content_detected` is None where the model has no safety checker; where it is
    True, this preview is entirely black. A preview that the server's content safety blocks is not sent.
    """

    image_index: int
    step: int
    encoded: bytes = field(repr=False)
    format: ImageFormat
    height: int
    width: int
    nsfw_content_detected: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarted:
    """The replica that worked on these images was lost; they are being made again from the start."""

    image_indexes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageReady:
    """An image is finished; `encoded` is a file of the `format`, or raw RGB rows.

    `nsfw_content_detected` is None where the model has no safety checker, `moderation_blocked` where the server has no content
    safety; an image with either is entirely black.
    """

    image_index: int
    encoded: bytes = field(repr=False)
    format: ImageFormat
    height: int
    width: int
    seed: int
    nsfw_content_detected: bool | None = None
    moderation_blocked: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The last event of a request that succeeded. The times are the server's, in seconds from acceptance."""

    parameters: EffectiveParameters
    queued_s: float
    total_s: float


Event: TypeAlias = Queued | Started | Step | Preview | Restarted | ImageReady | Done


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationAnswer:
    """All that a request amounts to; `images` by index."""

    images: tuple[ImageReady, ...]
    done: Done

    @property
    def parameters(self) -> EffectiveParameters:
        return self.done.parameters


def gather(events: Iterable[Event]) -> GenerationAnswer:
    """The answer that a complete series of events amounts to.

    Raises:
        ValueError: there is no `Done` among them.
    """
    images: list[ImageReady] = []
    done: Done | None = None
    for event in events:
        if isinstance(event, ImageReady):
            images.append(event)
        elif isinstance(event, Done):
            done = event
    if done is None:
        raise ValueError("the events end before the request is done")
    return GenerationAnswer(images=tuple(sorted(images, key=lambda image: image.image_index)), done=done)

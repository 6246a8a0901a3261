"""What a caller is told: the events of a request, and the descriptions of what made its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mii_serve.types.params import GenerationParams, ImageFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerDescription:
    """What the name of a sampler stands for: the diffusers class, and its options that are not the class's defaults, as JSON.

    A compiled sampler steps by a table of numbers, another by a scheduler object of its own; the pictures are the same.
    """

    class_name: str
    options: Mapping[str, str]
    is_compiled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDescription:
    """What really runs, told to every caller with every picture.

    `note` says why it is this engine where `auto` would have preferred another; empty when there is nothing to say.
    """

    engine: str
    dtype: str
    device: str
    model: str
    model_revision: str
    has_safety_checker: bool
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """The request is in line: samples that will start before its first one, and the estimated seconds until that one starts.

    Told on acceptance, and again while it moves forward. No estimate before there is a measurement.
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

    `estimated_left_s` is the measured pace of its turns times the calls that are left.
    """

    image_index: int
    step: int
    num_steps: int
    estimated_left_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What an image would look like if it ended after `step` UNet calls; checked for safety like the finished one."""

    image_index: int
    step: int
    encoded: bytes = field(repr=False)
    format: ImageFormat
    height: int
    width: int
    nsfw_content_detected: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageReady:
    """A finished image in the form the caller asked for."""

    image_index: int
    encoded: bytes = field(repr=False)
    format: ImageFormat
    height: int
    width: int
    seed: int
    nsfw_content_detected: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Effective:
    """What was really done, by what."""

    params: GenerationParams
    engine: EngineDescription
    scheduler: SchedulerDescription
    dropped_prompt: str = field(default="", repr=False)
    dropped_negative_prompt: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The last event of a request that ended well; times are seconds since the request was accepted."""

    effective: Effective
    queued_s: float
    total_s: float


Event = Queued | Started | Step | Preview | ImageReady | Done

"""What a caller of the SDK gets: results, events and a server's description. Frozen; prompts stay out of `repr`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from PIL import Image

from mii_serve.proto.codec import Activity
from mii_serve.types import GenerationDefaults, Limits, Queued, Started, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectiveParameters:
    """What was really done, after defaults, and by what. The dropped texts are what the text encoder had no room for."""

    prompt: str = field(repr=False)
    negative_prompt: str = field(repr=False)
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    num_images_per_prompt: int
    scheduler: str
    seed: int
    engine: str
    dtype: str
    device: str
    model: str
    model_revision: str
    dropped_prompt: str = field(repr=False)
    dropped_negative_prompt: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """The pictures of one request, by image index.

    `encoded` are the files as received. `nsfw_content_detected` is None where the model has no safety checker,
    `moderation_blocked` where the server has no content safety; an image with either is entirely black. The times are the
    server's, in seconds from acceptance.
    """

    images: list[Image.Image]
    nsfw_content_detected: list[bool] | None
    moderation_blocked: list[bool] | None = None
    seeds: list[int]
    parameters: EffectiveParameters
    encoded: list[bytes] = field(repr=False)
    request_id: str
    queued_s: float
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewReady:
    """What an unfinished image would look like if it ended after `step` UNet calls.

    `nsfw_content_detected` is None where the model has no safety checker; where it is True, this preview is entirely black.
    A preview that the server's content safety blocks is not sent.
    """

    image_index: int
    step: int
    image: Image.Image
    encoded: bytes = field(repr=False)
    nsfw_content_detected: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureReady:
    """An image is finished; `encoded` is the file as received."""

    image_index: int
    image: Image.Image
    encoded: bytes = field(repr=False)
    seed: int
    nsfw_content_detected: bool | None
    moderation_blocked: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarted:
    """The replica that worked on these images was lost; they are being made again from the start."""

    image_indexes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The last event of a request that succeeded."""

    parameters: EffectiveParameters
    queued_s: float
    total_s: float


Event: TypeAlias = Queued | Started | Step | PreviewReady | Restarted | PictureReady | Done


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaInfo:
    """One copy of the model; no activity while it is not ready."""

    index: int
    is_ready: bool
    num_restarts: int
    activity: Activity | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What runs behind a target, what it accepts and how busy it is.

    `schedulers` maps every accepted name to the name the server answers with. `activity` is that of all replicas together.
    `engine_note` says why this engine runs and not the preferred one, where that could not.
    """

    version: str
    deployment_name: str
    model: str
    model_revision: str
    engine: str
    dtype: str
    device: str
    has_safety_checker: bool
    defaults: GenerationDefaults
    limits: Limits
    schedulers: Mapping[str, str]
    activity: Activity
    replicas: tuple[ReplicaInfo, ...] = ()
    engine_note: str = ""

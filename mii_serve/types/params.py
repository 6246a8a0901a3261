"""The parameters of a request, and the rules they follow.

`GenerationParams` is what a request means once nothing is left open: building one, through `Capabilities.resolve`, is the
validation.
"""

from __future__ import annotations

import difflib
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from mii_serve.errors import InvalidRequestError

LATENT_SCALE = 8
"""Pixels per latent pixel, across and down; heights and widths are multiples of it."""

LatentShape = tuple[int, int]
"""Height and width of latents, in latent pixels."""

BatchKey = tuple[int, ...]
"""See `GenerationParams.batch_key`."""

MAX_SEED = 2**64 - 1
MAX_SCHEDULER_CHARS = 80

DEFAULT_SCHEDULER = "default"
"""The sampler that is the model's own scheduler, every option of it."""

RANDOM_SEED = -1
"""In many clients: draw a seed. Protocols without types read it so; where a seed is unsigned, it is left out."""

T = TypeVar("T")


class Priority(Enum):
    """How large a share of a busy server a request gets; never whether it is served at all."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class ImageFormat(Enum):
    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"
    RAW_RGB = "raw_rgb"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most, and least, one request may ask for."""

    max_prompt_chars: int = 4096
    max_num_inference_steps: int = 1000
    max_guidance_scale: float = 50.0
    min_size_px: int = 64
    max_size_px: int = 1024
    max_images_per_prompt: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What a request that leaves a parameter out gets: the model's own declaration, or diffusers' defaults."""

    scheduler: str
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    height: int = 512
    width: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParams:
    """A request with nothing left open. A picture is a pure function of these and its index."""

    prompt: str = field(repr=False)
    negative_prompt: str = field(repr=False)
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    num_images_per_prompt: int
    scheduler: str
    seed: int

    def seed_of(self, image_index: int) -> int:
        """Image i of a request is image 0 of the same request with seed + i (modulo 2**64)."""
        return (self.seed + image_index) & MAX_SEED

    @property
    def is_guided(self) -> bool:
        """Classifier-free guidance is on, as `StableDiffusionPipeline` decides it."""
        return self.guidance_scale > 1

    @property
    def num_rows(self) -> int:
        """UNet rows of one image: the prompt's, and with guidance the negative prompt's."""
        return 2 if self.is_guided else 1

    @property
    def latent_shape(self) -> LatentShape:
        return self.height // LATENT_SCALE, self.width // LATENT_SCALE

    @property
    def batch_key(self) -> BatchKey:
        """Only samples whose keys are equal can share a UNet call."""
        return self.latent_shape

    @property
    def work_per_call(self) -> int:
        """What one UNet call of one image costs: rows × latent pixels."""
        height, width = self.latent_shape
        return self.num_rows * height * width


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedParams:
    """What a caller said, before defaults and rules; None is "not said"."""

    prompt: str = field(repr=False)
    negative_prompt: str | None = field(default=None, repr=False)
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_images_per_prompt: int | None = None
    scheduler: str | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a deployed model accepts and assumes. `schedulers` maps every accepted name to the name we answer with."""

    limits: Limits
    defaults: GenerationDefaults
    schedulers: Mapping[str, str]

    def resolve(self, asked: RequestedParams, *, fallback_seed: int) -> GenerationParams:
        """Fill in the defaults and check every rule.

        Raises:
            InvalidRequestError: naming the field and the rule it breaks.
        """
        limits, defaults = self.limits, self.defaults
        prompt = _text("prompt", asked.prompt, limits)
        if not prompt.strip():
            raise InvalidRequestError("prompt", "must not be empty")
        return GenerationParams(
            prompt=prompt,
            negative_prompt=_text("negative_prompt", _or(asked.negative_prompt, ""), limits),
            height=_size("height", _or(asked.height, defaults.height), limits),
            width=_size("width", _or(asked.width, defaults.width), limits),
            num_inference_steps=_count(
                "num_inference_steps",
                _or(asked.num_inference_steps, defaults.num_inference_steps),
                limits.max_num_inference_steps,
            ),
            guidance_scale=_guidance(_or(asked.guidance_scale, defaults.guidance_scale), limits),
            num_images_per_prompt=_count(
                "num_images_per_prompt", _or(asked.num_images_per_prompt, 1), limits.max_images_per_prompt
            ),
            scheduler=self.scheduler_named(_or(asked.scheduler, defaults.scheduler)),
            seed=_seed(_or(asked.seed, fallback_seed)),
        )

    def scheduler_named(self, name: str) -> str:
        """The name that is answered with for one of the accepted spellings.

        Raises:
            InvalidRequestError
        """
        if not isinstance(name, str):
            raise InvalidRequestError("scheduler", "must be text", type(name).__name__)
        name = name[:MAX_SCHEDULER_CHARS]
        for spelling in (name, name.lower(), name.lower().replace(" ", "_").replace("-", "_")):
            if (known := self.schedulers.get(spelling)) is not None:
                return known
        names = sorted(set(self.schedulers.values()), key=lambda known: (known[0].isupper(), known))
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
        rule = f"must be one of the {len(names)} this model has, such as {', '.join(near)}"
        raise InvalidRequestError("scheduler", rule, repr(name))


def draw_seed() -> int:
    """A seed for a caller who named none: 32 bits, short enough to read out and exact as a JSON number."""
    return secrets.randbits(32)


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _text(name: str, value: str, limits: Limits) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(name, "must be text", type(value).__name__)
    if len(value) > limits.max_prompt_chars:
        raise InvalidRequestError(name, f"must be at most {limits.max_prompt_chars} characters", str(len(value)))
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(name, "must be valid Unicode text without lone surrogates") from None
    return value


def _whole(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(name, "must be a whole number", repr(value)[:80])
    return value


def _count(name: str, value: int, most: int) -> int:
    if not 1 <= _whole(name, value) <= most:
        raise InvalidRequestError(name, f"must be in [1, {most}]", str(value))
    return value


def _size(name: str, value: int, limits: Limits) -> int:
    if not limits.min_size_px <= _whole(name, value) <= limits.max_size_px or value % LATENT_SCALE:
        rule = f"must be a multiple of {LATENT_SCALE} in [{limits.min_size_px}, {limits.max_size_px}]"
        raise InvalidRequestError(name, rule, str(value))
    return value


def _guidance(value: float, limits: Limits) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestError("guidance_scale", "must be a number", repr(value)[:80])
    if not math.isfinite(value) or not 0 <= value <= limits.max_guidance_scale:
        rule = f"must be a finite number in [0, {limits.max_guidance_scale:g}]"
        raise InvalidRequestError("guidance_scale", rule, str(value))
    return float(value)


def _seed(value: int) -> int:
    if not 0 <= _whole("seed", value) <= MAX_SEED:
        raise InvalidRequestError("seed", "must be in [0, 2**64 - 1]", str(value))
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """How the finished pictures are handed over; no influence on their pixels before encoding."""

    format: ImageFormat = ImageFormat.PNG
    quality: int | None = None
    embed_metadata: bool = False
    preview_every: int | None = None
    """UNet calls between two previews of an unfinished image; None for no previews."""

    @classmethod
    def checked(
        cls, *, format: ImageFormat, quality: int | None, embed_metadata: bool, preview_every: int | None = None
    ) -> OutputOptions:
        """Check the options against each other.

        Raises:
            InvalidRequestError: naming the option and the rule.
        """
        if quality is not None:
            _count("output.quality", quality, 100)
            if format not in (ImageFormat.JPEG, ImageFormat.WEBP):
                raise InvalidRequestError("output.quality", "is for JPEG and WebP only", format.name)
        if embed_metadata and format is not ImageFormat.PNG:
            raise InvalidRequestError("output.embed_metadata", "is for PNG only", format.name)
        if preview_every is not None:
            _count("output.preview_every", preview_every, 1000)
        return cls(format=format, quality=quality, embed_metadata=embed_metadata, preview_every=preview_every)

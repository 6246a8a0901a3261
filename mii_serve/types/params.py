"""The parameters of a request, and the rules they follow.

`PARAMETERS` declares each one: its name, type, rule, default and help. Validation, command-line flags, the codec, the names in
JSON bodies and the benchmark's mixes follow from it; `STRENGTH` is that of requests that start from an image.
`GenerationParams` is what a request means once nothing is left open:
building one, through `Capabilities.resolve`, is the validation.
"""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypedDict

from mii_serve.errors import InvalidRequestError
from mii_serve.types.loras import NO_LORAS, LoraChoice, LoraInfo, checked_loras, chosen_loras

LATENT_SCALE = 8
"""Pixels per latent pixel, across and down; heights and widths are multiples of it."""

LatentShape = tuple[int, int]
"""Height and width of latents, in latent pixels."""

BatchKey = tuple[object, ...]
"""See `GenerationParams.batch_key`."""

IMAGE_STRENGTH, MASK_STRENGTH = 0.8, 1.0
"""Of a request with an image that names none, and with a mask, as in diffusers."""

MAX_IMAGE_BYTES = 8 * 1024 * 1024
"""Of the files of a request."""

MAX_SEED = 2**64 - 1
MAX_SCHEDULER_CHARS = 80

DEFAULT_SCHEDULER = "default"
"""The sampler that is the model's own scheduler, every option of it."""

RANDOM_SEED = -1
"""In many clients: draw a seed. Protocols without types read it so; where a seed is unsigned, it is left out."""


class Priority(Enum):
    """How large a share of a busy server a request gets; never whether it is served at all.

    BATCH runs on what the others leave idle, and on a small share beside them.
    """

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"
    BATCH = "batch"


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
    """A request with nothing left open. A picture is a pure function of these, its index and the request's `InputImage`.

    `strength` is None where there is no such image. `has_mask`: only a part of the image is repainted. `loras` are names with
    scales, as asked for; `lora_choice` is what they come to on the server.
    """

    prompt: str = field(repr=False)
    negative_prompt: str = field(repr=False)
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float = 0.0
    num_images_per_prompt: int
    scheduler: str
    seed: int
    strength: float | None = None
    has_mask: bool = False
    loras: Mapping[str, float] = field(default_factory=dict, hash=False)
    lora_choice: LoraChoice = NO_LORAS

    def seed_of(self, image_index: int) -> int:
        """Image i of a request is image 0 of the same request with seed + i (modulo 2**64)."""
        return (self.seed + image_index) & MAX_SEED

    @property
    def is_guided(self) -> bool:
        """Classifier-free guidance is on, as `StableDiffusionPipeline` decides it."""
        return self.guidance_scale > 1

    @property
    def num_skipped_steps(self) -> int:
        """The first of the `num_inference_steps`, which an image of this strength takes the place of.

        As `StableDiffusionImg2ImgPipeline.get_timesteps` counts them.
        """
        if self.strength is None:
            return 0
        return self.num_inference_steps - _num_steps_left(self.num_inference_steps, self.strength)

    @property
    def num_steps(self) -> int:
        """The steps that are made."""
        return self.num_inference_steps - self.num_skipped_steps

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
        return self.latent_shape if self.lora_choice.shares_calls else (*self.latent_shape, self.lora_choice.parts)

    @property
    def work_per_call(self) -> int:
        """What one UNet call of one image costs: rows × latent pixels."""
        height, width = self.latent_shape
        return self.num_rows * height * width


class GenerationKwargs(TypedDict, total=False):
    """The optional parameters as keyword arguments; None is the same as left out."""

    negative_prompt: str | None
    height: int | None
    width: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    guidance_rescale: float | None
    num_images_per_prompt: int | None
    scheduler: str | None
    seed: int | None
    strength: float | None
    loras: Mapping[str, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedParams:
    """What a caller asked for, before defaults and rules; None is "left out". The images are contents of files."""

    prompt: str = field(repr=False)
    negative_prompt: str | None = field(default=None, repr=False)
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    num_images_per_prompt: int | None = None
    scheduler: str | None = None
    seed: int | None = None
    image: bytes | None = field(default=None, repr=False)
    mask_image: bytes | None = field(default=None, repr=False)
    strength: float | None = None
    loras: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a deployed model accepts and assumes. `schedulers` maps every accepted name to the name we answer with."""

    limits: Limits
    defaults: GenerationDefaults
    schedulers: Mapping[str, str]
    loras: Mapping[str, LoraInfo] = field(default_factory=dict)

    def resolve(self, asked: RequestedParams, *, fallback_seed: int) -> GenerationParams:
        """Fill in the defaults and check every rule.

        Raises:
            InvalidRequestError: naming the field and the rule it breaks.
        """
        values: dict[str, Any] = {}
        for parameter in PARAMETERS:
            value = getattr(asked, parameter.name)
            if value is None:
                value = fallback_seed if parameter.name == "seed" else parameter.default_in(self.defaults)
            values[parameter.name] = parameter.checked(value, self)
        strength = self._strength_of(asked, values["num_inference_steps"])
        loras = checked_loras(asked.loras or {})
        choice = chosen_loras(loras, self.loras)
        has_mask = asked.mask_image is not None
        return GenerationParams(**values, strength=strength, has_mask=has_mask, loras=loras, lora_choice=choice)

    def _strength_of(self, asked: RequestedParams, num_inference_steps: int) -> float | None:
        if asked.image is None:
            if asked.mask_image is not None:
                raise InvalidRequestError("mask_image", "is for requests with an image only")
            if asked.strength is not None:
                raise InvalidRequestError("strength", "is for requests with an image only", str(asked.strength)[:80])
            return None
        usual = IMAGE_STRENGTH if asked.mask_image is None else MASK_STRENGTH
        strength: float = STRENGTH.checked(usual if asked.strength is None else asked.strength, self)
        if _num_steps_left(num_inference_steps, strength) < 1:
            least = f"1 / num_inference_steps, here {1 / num_inference_steps:.3g}: no step would be made"
            raise InvalidRequestError("strength", f"must be at least {least}", str(strength))
        return strength

    def scheduler_named(self, name: str) -> str:
        """The name that is answered with for one of the accepted spellings.

        Raises:
            InvalidRequestError: the model has no scheduler of this name.
        """
        name = name[:MAX_SCHEDULER_CHARS]
        for spelling in (name, name.lower(), name.lower().replace(" ", "_").replace("-", "_")):
            if (known := self.schedulers.get(spelling)) is not None:
                return known
        names = sorted(set(self.schedulers.values()), key=lambda known: (known[0].isupper(), known))
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
        rule = f"must be one of the {len(names)} this model has, such as {', '.join(near)}"
        raise InvalidRequestError("scheduler", rule, repr(name))


def _num_steps_left(num_inference_steps: int, strength: float) -> int:
    return min(int(num_inference_steps * strength), num_inference_steps)


def draw_seed() -> int:
    """A seed for a caller who named none: 32 bits, short enough to read out and exact as a JSON number."""
    return secrets.randbits(32)


def _count(name: str, value: int, most: int) -> int:
    if not 1 <= value <= most:
        raise InvalidRequestError(name, f"must be in [1, {most}]", str(value))
    return value


def _text(name: str, value: str, capabilities: Capabilities) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(name, "must be valid Unicode text without lone surrogates") from None
    return value


def _prompt(name: str, value: str, capabilities: Capabilities) -> str:
    if not value.strip():
        raise InvalidRequestError(name, "must not be empty")
    return _text(name, value, capabilities)


def _scheduler(name: str, value: str, capabilities: Capabilities) -> str:
    return capabilities.scheduler_named(value)


def _num_chars(limits: Limits) -> tuple[int, int]:
    return 0, limits.max_prompt_chars


def _size_px(limits: Limits) -> tuple[int, int]:
    return limits.min_size_px, limits.max_size_px


def _of_kind(name: str, value: Any, kind: type) -> Any:
    kinds: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, kinds):
        shown = type(value).__name__ if kind is str else repr(value)[:80]
        raise InvalidRequestError(name, f"must be {_KIND_NAMES[kind]}", shown)
    return value


_KIND_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """The declaration of one parameter.

    `kind` is the Python type of its value: str, int or float. `bounds` gives the least and the most that a number may be, or
    the characters that a text may have; a number is also a `multiple_of`, where that is set. `check` is a further rule: it
    takes the name, a value within the bounds and the model's capabilities and returns the value, or raises
    `InvalidRequestError`. The default is the field of the same name in `GenerationDefaults` where there is one, else `default`.
    `help` is for command lines, forms and documentation.
    """

    name: str
    kind: type[str] | type[int] | type[float]
    help: str
    bounds: Callable[[Limits], tuple[float, float]] | None = None
    multiple_of: int | None = None
    check: Callable[[str, Any, Capabilities], Any] | None = None
    default: Any = None

    def checked(self, value: Any, capabilities: Capabilities) -> Any:
        """The value, of the parameter's kind and within its rules.

        Raises:
            InvalidRequestError: naming the parameter and the rule it breaks.
        """
        value = self.of_kind(value)
        if self.bounds is not None:
            value = self._within(value, *self.bounds(capabilities.limits))
        return value if self.check is None else self.check(self.name, value, capabilities)

    def _within(self, value: Any, least: float, most: float) -> Any:
        if self.kind is str:
            if not least <= len(value) <= most:
                raise InvalidRequestError(self.name, f"must be at most {most} characters", str(len(value)))
            return value
        if not least <= value <= most or (self.multiple_of is not None and value % self.multiple_of):
            number = "a finite number " if self.kind is float else ""
            number = f"a multiple of {self.multiple_of} " if self.multiple_of is not None else number
            bound = "2**64 - 1" if most == MAX_SEED else f"{most:g}" if self.kind is float else str(most)
            raise InvalidRequestError(self.name, f"must be {number}in [{least}, {bound}]", str(value)[:80])
        return self.kind(value)

    def default_in(self, defaults: GenerationDefaults) -> Any:
        """What a request that leaves the parameter out gets from this model."""
        return getattr(defaults, self.name, self.default)

    def of_kind(self, value: Any) -> Any:
        """The value, if it is of the parameter's kind; a whole number is a number, too.

        Raises:
            InvalidRequestError: it is of another kind.
        """
        return _of_kind(self.name, value, self.kind)


PARAMETERS = (
    Parameter(name="prompt", kind=str, bounds=_num_chars, check=_prompt, help="what the image should show"),
    Parameter(
        name="negative_prompt", kind=str, bounds=_num_chars, check=_text, default="", help="what the image should not show"
    ),
    Parameter(
        name="height",
        kind=int,
        bounds=_size_px,
        multiple_of=LATENT_SCALE,
        help=f"height in pixels, a multiple of {LATENT_SCALE}",
    ),
    Parameter(
        name="width",
        kind=int,
        bounds=_size_px,
        multiple_of=LATENT_SCALE,
        help=f"width in pixels, a multiple of {LATENT_SCALE}",
    ),
    Parameter(
        name="num_inference_steps",
        kind=int,
        bounds=lambda limits: (1, limits.max_num_inference_steps),
        help="denoising steps",
    ),
    Parameter(
        name="guidance_scale",
        kind=float,
        bounds=lambda limits: (0, limits.max_guidance_scale),
        help="how closely the image follows the prompt; above 1, classifier-free guidance is on",
    ),
    Parameter(
        name="guidance_rescale",
        kind=float,
        bounds=lambda limits: (0, 1),
        default=0.0,
        help="how far guidance keeps the contrast of the prediction without it; 0.7 is usual for v-prediction models",
    ),
    Parameter(
        name="num_images_per_prompt",
        kind=int,
        bounds=lambda limits: (1, limits.max_images_per_prompt),
        default=1,
        help="number of images",
    ),
    Parameter(name="scheduler", kind=str, check=_scheduler, help="the sampler's name; the model's own scheduler by default"),
    Parameter(
        name="seed",
        kind=int,
        bounds=lambda limits: (0, MAX_SEED),
        help="image i is made from seed + i; drawn at random by default",
    ),
)
PARAMETER_NAMES = tuple(parameter.name for parameter in PARAMETERS)

STRENGTH = Parameter(
    name="strength",
    kind=float,
    bounds=lambda limits: (0, 1),
    default=IMAGE_STRENGTH,
    help="how far the result may leave the image: the part of the steps that is made; 0.8 by default, with a mask 1",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputImage:
    """The image that a request starts from, in the request's size: `rgb` is height × width × 3 bytes, row by row.

    `mask` is height × width bytes: where one is 128 or more, the image is repainted, elsewhere it stays.
    """

    rgb: bytes = field(repr=False)
    mask: bytes | None = field(default=None, repr=False)


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
            _count("output.quality", _of_kind("output.quality", quality, int), 100)
            if format not in (ImageFormat.JPEG, ImageFormat.WEBP):
                raise InvalidRequestError("output.quality", "is for JPEG and WebP only", format.name)
        if embed_metadata and format is not ImageFormat.PNG:
            raise InvalidRequestError("output.embed_metadata", "is for PNG only", format.name)
        if preview_every is not None:
            _count("output.preview_every", _of_kind("output.preview_every", preview_every, int), 1000)
        return cls(format=format, quality=quality, embed_metadata=embed_metadata, preview_every=preview_every)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A request as it was decoded: nothing is filled in yet, and only the output options are checked."""

    params: RequestedParams
    output: OutputOptions = field(default_factory=OutputOptions)
    priority: Priority = Priority.NORMAL


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRequest:
    """A request with nothing left open: what travels from the dispatcher to the replica."""

    params: GenerationParams
    output: OutputOptions = field(default_factory=OutputOptions)
    priority: Priority = Priority.NORMAL
    input_image: InputImage | None = None

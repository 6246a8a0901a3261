"""A request as it travels: its parameters, how its pictures are handed over, and its share of a busy server."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from mii_serve.errors import InvalidRequestError
from mii_serve.types.declarations import of_kind
from mii_serve.types.params import GenerationParams, RequestedParams


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
            _count("output.quality", of_kind("output.quality", quality, int), 100)
            if format not in (ImageFormat.JPEG, ImageFormat.WEBP):
                raise InvalidRequestError("output.quality", "is for JPEG and WebP only", format.name)
        if embed_metadata and format is not ImageFormat.PNG:
            raise InvalidRequestError("output.embed_metadata", "is for PNG only", format.name)
        if preview_every is not None:
            _count("output.preview_every", of_kind("output.preview_every", preview_every, int), 1000)
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


def _count(name: str, value: int, most: int) -> int:
    if not 1 <= value <= most:
        raise InvalidRequestError(name, f"must be in [1, {most}]", str(value))
    return value

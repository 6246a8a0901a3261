"""What a caller gets: the server's events, with the pixels of each image added, and the result they add up to."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

from PIL import Image

from mii_serve.errors import MiiServeError
from mii_serve.types import (
    Done,
    EffectiveParameters,
    ImageFormat,
    ImageReady,
    Preview,
    Queued,
    Restarted,
    Started,
    Step,
)
from mii_serve.types import Event as ServerEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewReady(Preview):
    """What an unfinished image would look like if it ended after `step` UNet calls, as pixels and as the file received.

    `nsfw_content_detected` is None where the model has no safety checker; where it is True, this preview is entirely black.
    A preview that the server's content safety blocks is not sent.
    """

    image: Image.Image


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureReady(ImageReady):
    """An image is finished: its pixels, and `encoded`, the file as received."""

    image: Image.Image


Event: TypeAlias = Queued | Started | Step | PreviewReady | Restarted | PictureReady | Done


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """The images of one request, by index.

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


class ResultBuilder:
    """Adds the pixels to the events of one request, and keeps what its result needs.

    `request_id` is the server's name for the request; empty while it is not known.
    """

    def __init__(self, request_id: str = "") -> None:
        self.request_id = request_id
        self._pictures: list[PictureReady] = []
        self._done: Done | None = None

    def add(self, event: ServerEvent) -> Event:
        """The same event for the caller, with `.image` where it has one.

        Raises:
            MiiServeError: the image cannot be read.
        """
        match event:
            case ImageReady():
                picture = PictureReady(image=_decode(event), **_values(event))
                self._pictures.append(picture)
                return picture
            case Preview():
                return PreviewReady(image=_decode(event), **_values(event))
            case Done():
                self._done = event
        return event

    def add_all(self, events: Iterable[ServerEvent]) -> GenerationResult:
        """The result of a whole series of events.

        Raises:
            MiiServeError: as `add` and `result`.
        """
        for event in events:
            self.add(event)
        return self.result()

    def result(self) -> GenerationResult:
        """What the events add up to, once all have come.

        Raises:
            MiiServeError: they ended early, or without all the images.
        """
        if (done := self._done) is None:
            raise MiiServeError("the stream ended before the request was done")
        pictures = sorted(self._pictures, key=lambda picture: picture.image_index)
        indexes = [picture.image_index for picture in pictures]
        if indexes != list(range(done.parameters.num_images_per_prompt)):
            raise MiiServeError(f"the server sent images {indexes} of {done.parameters.num_images_per_prompt}")
        return GenerationResult(
            images=[picture.image for picture in pictures],
            nsfw_content_detected=_if_all_known([picture.nsfw_content_detected for picture in pictures]),
            moderation_blocked=_if_all_known([picture.moderation_blocked for picture in pictures]),
            seeds=[picture.seed for picture in pictures],
            parameters=done.parameters,
            encoded=[picture.encoded for picture in pictures],
            request_id=self.request_id,
            queued_s=done.queued_s,
            total_s=done.total_s,
        )


def _if_all_known(flags: Sequence[bool | None]) -> list[bool] | None:
    known = [flag for flag in flags if flag is not None]
    return known if len(known) == len(flags) else None


def _values(event: ImageReady | Preview) -> dict[str, Any]:
    return {one.name: getattr(event, one.name) for one in fields(event)}


def _decode(event: ImageReady | Preview) -> Image.Image:
    """The pixels, which must be of the announced format and size; the file's bytes are not copied."""
    size = (event.width, event.height)
    try:
        if event.format is ImageFormat.RAW_RGB:
            return Image.frombytes("RGB", size, event.encoded)
        with Image.open(io.BytesIO(event.encoded), formats=[event.format.name]) as file:
            if file.size != size:
                raise ValueError(f"it is {file.width}x{file.height} and was announced as {size[0]}x{size[1]}")
            return file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MiiServeError(f"image {event.image_index} cannot be read as {event.format.name}: {error}") from error

"""Message ⇄ value for the caller's side, as pure functions: both clients and `mii_serve generate` use these.

The rules of a request are the server's to check. Here a value is refused only where no message could carry it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Literal, TypeAlias

from PIL import Image

from mii_serve.client.values import (
    Done,
    EffectiveParameters,
    Event,
    GenerationResult,
    PictureReady,
    PreviewReady,
    ReplicaInfo,
    Restarted,
    ServerInfo,
)
from mii_serve.errors import InvalidRequestError, MiiServeError
from mii_serve.proto.codec import Activity, decode_capabilities, encode_request, image_format_number
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.types import ImageFormat, OutputOptions, Priority, Queued, RequestedParams, Started, Step

OutputFormat: TypeAlias = Literal["png", "jpeg", "webp", "raw_rgb"]
PriorityName: TypeAlias = Literal["high", "normal", "low"]

_FORMAT_OF: dict[int, ImageFormat] = {image_format_number(known): known for known in ImageFormat}
_LONGEST_TIMEOUT_S = 365 * 86400.0


def build_request(
    prompt: str,
    *,
    negative_prompt: str | None,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    seed: int | None,
    height: int | None,
    width: int | None,
    num_images_per_prompt: int | None,
    scheduler: str | None,
    output_format: OutputFormat,
    quality: int | None,
    embed_metadata: bool,
    preview_every: int | None = None,
    priority: PriorityName | None = None,
) -> pb.GenerateRequest:
    """Write the request for a call.

    Raises:
        InvalidRequestError: a value that no message can carry.
    """
    if isinstance(prompt, list | tuple):
        raise InvalidRequestError("prompt", "must be one text; make one call for each prompt", type(prompt).__name__)
    if not isinstance(prompt, str):
        raise InvalidRequestError("prompt", "must be text", type(prompt).__name__)
    asked = RequestedParams(
        prompt=prompt,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        num_images_per_prompt=num_images_per_prompt,
        scheduler=scheduler,
        seed=seed,
    )
    try:
        image_format = ImageFormat(output_format)
    except ValueError:
        names = ", ".join(known.value for known in ImageFormat)
        raise InvalidRequestError("output_format", f"must be one of {names}", repr(output_format)[:80]) from None
    output = OutputOptions.checked(
        format=image_format, quality=quality, embed_metadata=embed_metadata, preview_every=preview_every
    )
    return encode_request(asked, output, _priority(priority))


def _priority(name: PriorityName | None) -> Priority | None:
    try:
        return None if name is None else Priority(name)
    except ValueError:
        names = ", ".join(known.value for known in Priority)
        raise InvalidRequestError("priority", f"must be one of {names}", repr(name)[:80]) from None


def check_timeout(timeout: float | None) -> float | None:
    """The seconds to give gRPC; a year stands for anything longer.

    Raises:
        InvalidRequestError: not a finite number above 0.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise InvalidRequestError("timeout", "must be a number of seconds or None", type(timeout).__name__)
    if not math.isfinite(timeout) or timeout <= 0:
        raise InvalidRequestError("timeout", "must be a finite number of seconds above 0 or None", str(timeout))
    return min(float(timeout), _LONGEST_TIMEOUT_S)


def check_bound(timeout: float) -> float:
    """`check_timeout` for a wait that must end.

    Raises:
        InvalidRequestError: not a finite number above 0.
    """
    bound = check_timeout(timeout)
    if bound is None:
        raise InvalidRequestError("timeout", "must be a finite number of seconds above 0", "None")
    return bound


# ---- answers -----------------------------------------------------------------------------------------------------


def decode_response(message: pb.GenerateResponse) -> GenerationResult:
    """Read a unary answer.

    Raises:
        MiiServeError: an image cannot be read, or is missing.
    """
    pictures = [_picture(image) for image in message.images]
    return _result(message.request_id, pictures, _done(message.parameters, message.timings))


def decode_server_info(message: pb.GetServerInfoResponse) -> ServerInfo:
    capabilities = decode_capabilities(message)
    return ServerInfo(
        version=message.version,
        deployment_name=message.deployment_name,
        model=message.model,
        model_revision=message.model_revision,
        engine=message.engine,
        dtype=message.dtype,
        device=message.device,
        has_safety_checker=message.has_safety_checker,
        engine_note=message.engine_note,
        defaults=capabilities.defaults,
        limits=capabilities.limits,
        schedulers=capabilities.schedulers,
        activity=_activity(message.activity),
        replicas=tuple(
            ReplicaInfo(
                index=replica.index,
                is_ready=replica.is_ready,
                num_restarts=replica.num_restarts,
                activity=_activity(replica.activity) if replica.HasField("activity") else None,
            )
            for replica in message.replicas
        ),
    )


def _activity(message: pb.GetServerInfoResponse.Activity) -> Activity:
    has_bound = message.HasField("max_cells_per_call")
    counts = {one.name: getattr(message, one.name) for one in fields(Activity)}
    return Activity(**{**counts, "max_cells_per_call": message.max_cells_per_call if has_bound else None})


class Gathering:
    """Turns the messages of one stream into events, and keeps what its result needs."""

    def __init__(self) -> None:
        self._request_id = ""
        self._pictures: list[PictureReady] = []
        self._done: Done | None = None

    @property
    def request_id(self) -> str:
        """The server's name for the request; empty until the first event."""
        return self._request_id

    def take(self, message: pb.GenerateEvent) -> Event | None:
        """The event in the message; None for a kind that only a newer server knows.

        Raises:
            MiiServeError: an image cannot be read.
        """
        self._request_id = message.request_id
        match message.WhichOneof("event"):
            case "queued":
                queued = message.queued
                wait_s = queued.estimated_wait_s if queued.HasField("estimated_wait_s") else None
                return Queued(num_samples_ahead=queued.num_samples_ahead, estimated_wait_s=wait_s)
            case "started":
                return Started(image_index=message.started.image_index)
            case "step":
                step = message.step
                return Step(
                    image_index=step.image_index,
                    step=step.step,
                    num_steps=step.num_steps,
                    estimated_left_s=step.estimated_left_s if step.HasField("estimated_left_s") else None,
                )
            case "restarted":
                return Restarted(image_indexes=tuple(message.restarted.image_indexes))
            case "preview":
                return _preview(message.preview)
            case "image":
                picture = _picture(message.image)
                self._pictures.append(picture)
                return picture
            case "done":
                self._done = _done(message.done.parameters, message.done.timings)
                return self._done
            case _:
                return None

    def result(self) -> GenerationResult:
        """What has been gathered, once the stream has ended.

        Raises:
            MiiServeError: the stream ended early, or without all the images.
        """
        if self._done is None:
            raise MiiServeError("the stream ended before the request was done")
        return _result(self._request_id, self._pictures, self._done)


def _result(request_id: str, pictures: Sequence[PictureReady], done: Done) -> GenerationResult:
    by_index = sorted(pictures, key=lambda picture: picture.image_index)
    indexes = [picture.image_index for picture in by_index]
    if indexes != list(range(done.parameters.num_images_per_prompt)):
        raise MiiServeError(f"the server sent images {indexes} of {done.parameters.num_images_per_prompt}")
    return GenerationResult(
        images=[picture.image for picture in by_index],
        nsfw_content_detected=_if_all_known([picture.nsfw_content_detected for picture in by_index]),
        moderation_blocked=_if_all_known([picture.moderation_blocked for picture in by_index]),
        seeds=[picture.seed for picture in by_index],
        parameters=done.parameters,
        encoded=[picture.encoded for picture in by_index],
        request_id=request_id,
        queued_s=done.queued_s,
        total_s=done.total_s,
    )


def _if_all_known(flags: Sequence[bool | None]) -> list[bool] | None:
    known = [flag for flag in flags if flag is not None]
    return known if len(known) == len(flags) else None


def _done(parameters: pb.EffectiveParameters, timings: pb.Timings) -> Done:
    return Done(
        parameters=EffectiveParameters(**{one.name: getattr(parameters, one.name) for one in fields(EffectiveParameters)}),
        queued_s=timings.queued_s,
        total_s=timings.total_s,
    )


def _picture(message: pb.GeneratedImage) -> PictureReady:
    return PictureReady(
        image_index=message.index,
        image=_pixels(message, message.index),
        encoded=message.data,
        seed=message.seed,
        nsfw_content_detected=message.nsfw_content_detected if message.HasField("nsfw_content_detected") else None,
        moderation_blocked=message.moderation_blocked if message.HasField("moderation_blocked") else None,
    )


def _preview(message: pb.GenerateEvent.Preview) -> PreviewReady:
    return PreviewReady(
        image_index=message.image_index,
        step=message.step,
        image=_pixels(message, message.image_index),
        encoded=message.data,
        nsfw_content_detected=message.nsfw_content_detected if message.HasField("nsfw_content_detected") else None,
    )


def _pixels(message: pb.GeneratedImage | pb.GenerateEvent.Preview, index: int) -> Image.Image:
    image_format = _FORMAT_OF.get(message.format)
    if image_format is None:
        raise MiiServeError(f"image {index} has a format this client does not know, number {message.format}")
    size = (message.width, message.height)
    try:
        if image_format is ImageFormat.RAW_RGB:
            return Image.frombytes("RGB", size, message.data)
        with Image.open(io.BytesIO(message.data), formats=[image_format.name]) as file:
            if file.size != size:
                raise ValueError(f"it is {file.width}x{file.height} and was announced as {size[0]}x{size[1]}")
            return file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MiiServeError(f"image {index} cannot be read as {image_format.name}: {error}") from error

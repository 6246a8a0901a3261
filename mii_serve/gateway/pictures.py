"""Pictures from the desk for an HTTP call: its budget, its requests side by side, and bytes as text."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mii_serve.config import HttpConfig
from mii_serve.errors import InvalidRequestError
from mii_serve.gateway.door import Call
from mii_serve.gateway.problems import OverLimitError
from mii_serve.proto.codec import gather_response
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.server.desk import Desk


def check_budget(settings: HttpConfig, requests: Sequence[pb.GenerateRequest], default_steps: int) -> None:
    """Refuse a call that asks for more work than one call may.

    Raises:
        OverLimitError
    """
    num_images = num_steps = 0
    for request in requests:
        images = request.num_images_per_prompt if request.HasField("num_images_per_prompt") else 1
        steps = request.num_inference_steps if request.HasField("num_inference_steps") else default_steps
        num_images += max(0, images)
        num_steps += max(0, images) * max(0, steps)
    for name, count, most in (("images", num_images, settings.max_images), ("denoising steps", num_steps, settings.max_steps)):
        if count > most:
            raise too_many(name, count, most)


def too_many(name: str, count: int, most: int) -> OverLimitError:
    """The refusal of a call for more of something than one call may have."""
    return OverLimitError("request", f"must be for at most {most} {name} in all", str(count))


async def draw(desk: Desk, call: Call, request: pb.GenerateRequest, part: int | None = None) -> pb.GenerateResponse:
    """The pictures of one request.

    Raises:
        MiiServeError: what became of it.
    """
    async with contextlib.aclosing(desk.events(request, call.visit(part))) as events:
        return gather_response([event async for event in events])


async def draw_all(
    desk: Desk, call: Call, requests: Sequence[pb.GenerateRequest], blame: Callable[[int, InvalidRequestError], None]
) -> list[pb.GenerateResponse]:
    """The pictures of all requests, made side by side; in order. The first that fails takes the others along.

    Raises:
        MiiServeError: of the first request that failed. `blame` has seen an `InvalidRequestError` with its request's index.
    """

    async def one(index: int, request: pb.GenerateRequest) -> pb.GenerateResponse:
        try:
            return await draw(desk, call, request, index if len(requests) > 1 else None)
        except InvalidRequestError as error:
            blame(index, error)
            raise

    tasks = [asyncio.ensure_future(one(index, request)) for index, request in enumerate(requests)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done() and (error := task.exception()) is not None:
                raise error
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def relocate(error: InvalidRequestError, names: Mapping[str, str]) -> None:
    """Let the error speak of the member that the caller of this protocol knows, where `names` has one for its field."""
    if (name := names.get(error.field)) is not None:
        text = str(error)
        error.args = (f"{name}: {text.removeprefix(f'{error.field}: ')}",)
        error.field = name


def is_blocked(image: pb.GeneratedImage) -> bool:
    """Whether content safety held this picture back."""
    return image.moderation_blocked


def nsfw_flag(image: pb.GeneratedImage | pb.GenerateEvent.Preview) -> bool | None:
    """The safety checker's word; None where the model has none."""
    return image.nsfw_content_detected if image.HasField("nsfw_content_detected") else None


def as_text(image: bytes) -> str:
    return base64.b64encode(image).decode("ascii")


def as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()

"""Images for an HTTP call: its budget, its requests side by side, errors in the caller's words, and images as JSON."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mii_serve.config import HttpConfig
from mii_serve.errors import InvalidRequestError
from mii_serve.gateway.errors import OverLimitError
from mii_serve.server.call import CallContext
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.types import GenerationAnswer, GenerationRequest


def check_budget(settings: HttpConfig, requests: Sequence[GenerationRequest], default_steps: int) -> None:
    """Refuse a call that asks for more work than one call may.

    Raises:
        OverLimitError
    """
    num_images = num_steps = 0
    for request in requests:
        images = request.params.num_images_per_prompt
        steps = request.params.num_inference_steps
        images = 1 if images is None else max(0, images)
        num_images += images
        num_steps += images * (default_steps if steps is None else max(0, steps))
    for name, count, most in (("images", num_images, settings.max_images), ("denoising steps", num_steps, settings.max_steps)):
        if count > most:
            raise too_many(name, count, most)


def too_many(name: str, count: int, most: int) -> OverLimitError:
    """The refusal of a call for more of something than one call may have."""
    return OverLimitError("request", f"must be for at most {most} {name} in all", str(count))


async def generate_all(
    dispatcher: Dispatcher,
    context: CallContext,
    requests: Sequence[GenerationRequest],
    relocate_error: Callable[[int, InvalidRequestError], None],
) -> list[GenerationAnswer]:
    """The answers to all requests of a call, which run side by side; in order. The first that fails cancels the others.

    Raises:
        MiiServeError: of the first request that failed. `relocate_error` was called with an `InvalidRequestError` and the index
            of its request.
    """

    async def one(index: int, request: GenerationRequest) -> GenerationAnswer:
        try:
            return await dispatcher.generate(request, context.for_part(index) if len(requests) > 1 else context)
        except InvalidRequestError as error:
            relocate_error(index, error)
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
    """Let the error name the member that the caller of this protocol knows, where `names` has one for its field."""
    if (name := names.get(error.field)) is not None:
        error.rename(name)


def to_base64(image: bytes) -> str:
    return base64.b64encode(image).decode("ascii")


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()

"""DeepSpeed-MII's RESTful gateway, `POST /mii/NAME`: `{"request": {...}, "kwargs": {...}}` in, the text of a JSON object out.

MII answers with a JSON text that holds the JSON of its reply message. For pictures its own gateway fails before that, so the
members are those of the message that its gRPC service sends: raw pixels, in protobuf's JSON form.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from typing import Any

from pydantic import Field
from starlette.responses import Response

from mii_serve.config import HttpConfig
from mii_serve.errors import InvalidRequestError, MiiServeError
from mii_serve.gateway.errors import openai_problem, problem_response
from mii_serve.gateway.generation import too_many
from mii_serve.gateway.json_body import JsonObject, shown, validated
from mii_serve.gateway.middleware import HttpCall
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.dropped_text import dropped_headers
from mii_serve.server.mii import MiiRequest, draw_pictures
from mii_serve.server.model_names import ModelNames
from mii_serve.types import ImageReady, ResolvedRequest

PATH = "/mii"
MAX_PROMPTS = 64
MAX_KWARGS = 64
_HOLE = "@"
"""Stands for base64 text in what is encoded first; the rest has no such sign."""


class _Query(JsonObject):
    """`query` is what `prompt` was called before deepspeed-mii 0.2.2."""

    prompt: str | list[str] | None = None
    query: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None


class MiiBody(JsonObject):
    request: _Query
    kwargs: dict[str, Any] = Field(default_factory=dict)


class MiiDialect:
    """`message` is what Flask's errors have."""

    def refusal(self, error: MiiServeError, request_id: str) -> Response:
        return problem_response(openai_problem(error))

    def last_event(self, error: MiiServeError, request_id: str) -> bytes:
        raise AssertionError("no answer of this gateway is a stream")


class MiiPictures:
    """The answer to `POST /mii/{deployment}`."""

    def __init__(self, dispatcher: Dispatcher, settings: HttpConfig, names: ModelNames) -> None:
        self._dispatcher = dispatcher
        self._settings = settings
        self._names = names

    async def __call__(self, call: HttpCall) -> Response:
        await self._names.check(call.request.path_params["deployment"])
        answers = await draw_pictures(self._dispatcher, parse(call.body), call.context, self._check)
        images = [image for answer in answers for image in answer.images]
        content = await asyncio.to_thread(_to_json, images, call.context.seconds)
        headers = {
            **dropped_headers([answer.parameters for answer in answers]),
            **self._dispatcher.provenance_headers(images[0]),
        }
        return Response(content, 200, headers, "application/json")

    def _check(self, requests: Sequence[ResolvedRequest]) -> None:
        counts = [one.params.num_images_per_prompt for one in requests]
        steps = [one.params.num_images_per_prompt * one.params.num_inference_steps for one in requests]
        for name, count, most in (
            ("images", sum(counts), self._settings.max_images),
            ("denoising steps", sum(steps), self._settings.max_steps),
        ):
            if count > most:
                raise too_many(name, count, most)


def parse(body: object) -> MiiRequest:
    """What a body asks for.

    Raises:
        InvalidRequestError: naming the member and the rule.
    """
    asked = validated(MiiBody, body)
    if asked.request.prompt is not None and asked.request.query is not None:
        raise InvalidRequestError("request.query", "must not come with request.prompt: they are two names of the same")
    prompts = _texts(asked.request.prompt if asked.request.query is None else asked.request.query)
    negatives = _texts(asked.request.negative_prompt)
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise InvalidRequestError("request.prompt", f"must be one text or up to {MAX_PROMPTS}", str(len(prompts)))
    if len(negatives) not in (0, len(prompts)):
        rule = "must be none, or one for each prompt"
        raise InvalidRequestError("request.negative_prompt", rule, f"{len(negatives)} for {len(prompts)}")
    if len(asked.kwargs) > MAX_KWARGS:
        raise InvalidRequestError("kwargs", f"must be at most {MAX_KWARGS}", str(len(asked.kwargs)))
    for name, value in asked.kwargs.items():
        if not isinstance(value, str | int | float):
            raise InvalidRequestError(f"kwargs.{name[:60]}", "must be text, a number, true or false", shown(value))
    return MiiRequest(prompts=prompts, negative_prompts=negatives, kwargs=asked.kwargs)


def _texts(given: str | list[str] | None) -> list[str]:
    return [] if given is None else [given] if isinstance(given, str) else given


def _to_json(images: Sequence[ImageReady], seconds: float) -> bytes:
    """The reply message as protobuf's JSON, whose names and 64-bit numbers are texts, in a JSON text as Flask sends it."""
    first = images[0]
    reply: dict[str, Any] = {
        "images": [_HOLE] * len(images),
        "nsfwContentDetected": [bool(image.nsfw_content_detected) for image in images],
        "mode": "RGB",
        "sizeW": str(first.width),
        "sizeH": str(first.height),
        "timeTaken": round(seconds, 6),
    }
    before, *between = json.dumps(json.dumps(reply, indent=2)).encode().split(_HOLE.encode())
    pieces = [before]
    for image, rest in zip(images, between, strict=True):
        pieces += [base64.b64encode(image.encoded), rest]
    return b"".join((*pieces, b"\n"))

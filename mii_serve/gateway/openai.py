"""OpenAI's images API, and Azure's dialect of it for Stability's models: `POST /v1/images/generations` and its other addresses.

What the API has and a Stable Diffusion server can do is done; what would silently have no effect is harmless and listed in
`IGNORED`, or refused by name. Beside the API's own members, parameters have the names they have in diffusers.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response

from mii_serve.config import HttpConfig
from mii_serve.errors import InvalidRequestError, MiiServeError, UnauthenticatedError
from mii_serve.gateway.bodies import a_text, an_object, no_others, one_of, shown
from mii_serve.gateway.door import Call, EventStream
from mii_serve.gateway.names import ModelNames
from mii_serve.gateway.pictures import as_json, as_text, check_budget, draw, is_blocked, nsfw_flag, relocate
from mii_serve.gateway.problems import Blocked, ImagesHeldBackError, envelope, openai_problem, problem_headers
from mii_serve.proto.codec import encode_request
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.server.desk import Desk
from mii_serve.types import Capabilities, ImageFormat, OutputOptions, RequestedParams

MAX_N = 10
MAX_PARTIAL_IMAGES = 3
OURS = ("negative_prompt", "num_inference_steps", "guidance_scale", "seed", "scheduler")
"""Members that the API does not have."""
IGNORED = {
    "user": None,
    "safety_identifier": None,
    "moderation": ("low", "auto"),
    "style": ("vivid", "natural"),
}
"""Accepted without effect: who asks, a wish for less moderation, and the styles of another model."""
QUALITIES = {"auto": 1.0, "standard": 1.0, "low": 0.5, "medium": 1.0, "high": 1.5, "hd": 1.5, "xhigh": 2.0, "max": 2.0}
"""Times the model's own number of steps, where the request names none."""
FORMATS = {"png": ImageFormat.PNG, "jpeg": ImageFormat.JPEG, "jpg": ImageFormat.JPEG, "webp": ImageFormat.WEBP}
KNOWN = (
    *("prompt", "model", "n", "size", "quality", "response_format", "output_format", "output_compression", "background"),
    *("stream", "partial_images", *OURS, *IGNORED),
)
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)
_PATHS = {"num_images_per_prompt": "n", "height": "size", "width": "size", "output.quality": "output_compression"}
_STREAM_PATHS = {**_PATHS, "output.preview_every": "partial_images"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesRequest:
    """A body, read. `num_partials` is None where no stream was asked for."""

    message: pb.GenerateRequest
    format: str
    quality: str
    num_partials: int | None


class OpenAiDialect:
    def refusal(self, error: MiiServeError) -> Response:
        problem = openai_problem(error)
        return JSONResponse(_body(error), problem.status, problem_headers(problem))

    def broken_off(self, error: MiiServeError) -> bytes:
        return _event("error", {"type": "error", "error": _body(error)["error"]})


def _body(error: MiiServeError) -> dict[str, Any]:
    body: dict[str, Any] = envelope(openai_problem(error))
    if isinstance(error, Blocked):
        categories = list(error.categories)
        body["error"] |= {
            "code": "moderation_blocked",
            "type": "image_generation_user_error",
            "message": f"Your request was rejected by the safety system. {error} safety_violations=[{', '.join(categories)}]",
            "moderation_details": {"moderation_stage": error.stage, "categories": categories},
        }
        body["message"] = body["error"]["message"]
    elif isinstance(error, UnauthenticatedError):
        body["error"]["type"] = "authentication_error"
    return body


class Images:
    """The answer to a request for images, whole or as a stream."""

    def __init__(self, desk: Desk, settings: HttpConfig, names: ModelNames) -> None:
        self._desk = desk
        self._settings = settings
        self._names = names

    async def __call__(self, call: Call) -> Response | EventStream:
        body = an_object("", call.body)
        for name in (call.request.path_params.get("deployment"), body.get("model")):
            if name is not None:
                await self._names.check(a_text("model", name))
        capabilities = self._desk.capabilities
        asked = parse(body, capabilities)
        call.facts["is_stream"] = asked.num_partials is not None
        check_budget(self._settings, [asked.message], capabilities.defaults.num_inference_steps)
        try:
            if asked.num_partials is None:
                return await self._whole(call, asked)
            return await self._stream(call, asked, asked.num_partials)
        except InvalidRequestError as error:
            relocate(error, _STREAM_PATHS)
            raise

    async def _whole(self, call: Call, asked: ImagesRequest) -> Response:
        answer = await draw(self._desk, call, asked.message)
        self._refuse_if_all_held_back(answer.images)
        return Response(await asyncio.to_thread(_rendered, answer, asked), 200, media_type="application/json")

    async def _stream(self, call: Call, asked: ImagesRequest, num_partials: int) -> EventStream:
        """Begin, so that a request that is refused has the status of an error; the rest follows as it happens."""
        pieces = self._pieces(call, asked, num_partials)
        try:
            await anext(pieces)
        except BaseException:
            await pieces.aclose()
            raise
        return EventStream(pieces)

    async def _pieces(self, call: Call, asked: ImagesRequest, num_partials: int) -> AsyncGenerator[bytes, None]:
        """An empty piece once the request is accepted; then the partial images and the whole one."""
        num_shown, images = 0, list[pb.GeneratedImage]()
        async with contextlib.aclosing(self._desk.events(asked.message, call.visit())) as events:
            async for event in events:
                match event.WhichOneof("event"):
                    case "queued" | "started":
                        yield b": working\n\n"
                    case "preview" if num_shown < num_partials:
                        told = _told("partial_image", asked, event.preview)
                        yield await asyncio.to_thread(_event, told["type"], {**told, "partial_image_index": num_shown})
                        num_shown += 1
                    case "image":
                        images.append(event.image)
                    case "done":
                        self._refuse_if_all_held_back(images)
                        told = _told("completed", asked, images[0])
                        extra = {"usage": _NO_USAGE, "seed": images[0].seed, "nsfw_content_detected": nsfw_flag(images[0])}
                        yield await asyncio.to_thread(_event, told["type"], {**told, **extra})

    def _refuse_if_all_held_back(self, images: Sequence[pb.GeneratedImage]) -> None:
        if all(is_blocked(image) for image in images):
            raise ImagesHeldBackError("Content safety blocked every picture.", "moderation")
        if self._settings.refuse_flagged_images and all(image.nsfw_content_detected or is_blocked(image) for image in images):
            raise ImagesHeldBackError("The model's safety checker fired on every picture.", "nsfw")


class Models:
    """The answers to `GET /v1/models` and `GET /v1/models/{model}`."""

    def __init__(self, names: ModelNames) -> None:
        self._names = names

    async def all(self, call: Call) -> Response:
        return JSONResponse({"object": "list", "data": [await self._model()]})

    async def one(self, call: Call) -> Response:
        await self._names.check(call.request.path_params["model"])
        return JSONResponse(await self._model())

    async def _model(self) -> dict[str, Any]:
        model = (await self._names.info()).model
        owner, _, _ = model.rpartition("/")
        return {"id": model, "object": "model", "created": self._names.created, "owned_by": owner or "mii_serve"}


# ---- answers -----------------------------------------------------------------------------------------------------


_NO_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""Nothing is charged by token here; the client's type wants the numbers."""


def _rendered(answer: pb.GenerateResponse, asked: ImagesRequest) -> bytes:
    texts = ["" if is_blocked(image) else as_text(image.data) for image in answer.images]
    done = answer.parameters
    return as_json(
        {
            "created": int(time.time()),
            "data": [
                {"b64_json": text, "seed": image.seed, "nsfw_content_detected": nsfw_flag(image)}
                for text, image in zip(texts, answer.images, strict=True)
            ],
            "background": "opaque",
            "output_format": asked.format,
            "quality": asked.quality,
            "size": f"{done.width}x{done.height}",
            "image": texts[0],
            "parameters": {
                "num_inference_steps": done.num_inference_steps,
                "guidance_scale": done.guidance_scale,
                "scheduler": done.scheduler,
                "seed": done.seed,
                "engine": done.engine,
                "dtype": done.dtype,
                "model": done.model,
                "model_revision": done.model_revision,
            },
        }
    )


def _told(kind: str, asked: ImagesRequest, image: pb.GeneratedImage | pb.GenerateEvent.Preview) -> dict[str, Any]:
    return {
        "type": f"image_generation.{kind}",
        "b64_json": as_text(image.data),
        "background": "opaque",
        "created_at": int(time.time()),
        "output_format": asked.format,
        "quality": asked.quality,
        "size": f"{image.width}x{image.height}",
    }


def _event(name: str, value: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + as_json(value) + b"\n\n"


# ---- reading the body --------------------------------------------------------------------------------------------


def parse(body: dict[str, Any], capabilities: Capabilities) -> ImagesRequest:
    """What a body asks for; null is not said.

    Raises:
        InvalidRequestError: naming the member and the rule.
    """
    no_others("", body, (*KNOWN, "image_prompt"))
    said = {name: value for name, value in body.items() if value is not None}
    if "image_prompt" in said:
        raise InvalidRequestError("image_prompt", "is not supported: this server makes pictures from text only")
    for name, choices in IGNORED.items():
        if name in said:
            one_of(name, said[name], choices) if choices else a_text(name, said[name])
    if "prompt" not in said:
        raise InvalidRequestError("prompt", "is missing")
    if said.get("background", "auto") != "auto":
        one_of("background", said["background"], ("auto", "opaque"))
    quality = one_of("quality", said.get("quality", "auto"), tuple(QUALITIES))
    steps = said.get("num_inference_steps")
    if steps is None and QUALITIES[quality] != 1.0:
        wanted = round(capabilities.defaults.num_inference_steps * QUALITIES[quality])
        steps = min(capabilities.limits.max_num_inference_steps, max(1, wanted))
    num_images = _count("n", said.get("n", 1), 1, MAX_N)
    width, height = _size(said.get("size", "auto"))
    name = _format(said)
    num_partials = _num_partials(said, num_images)
    calls = steps if isinstance(steps, int) else capabilities.defaults.num_inference_steps
    asked = RequestedParams(
        prompt=a_text("prompt", said["prompt"]),
        negative_prompt=said.get("negative_prompt"),
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=said.get("guidance_scale"),
        num_images_per_prompt=num_images,
        scheduler=said.get("scheduler"),
        seed=said.get("seed"),
    )
    output = OutputOptions(
        format=FORMATS[name], quality=_compression(said, name), preview_every=_preview_every(calls, num_partials)
    )
    return ImagesRequest(message=encode_request(asked, output), format=name, quality=quality, num_partials=num_partials)


def _preview_every(num_steps: int, num_partials: int | None) -> int | None:
    """UNet calls between previews, so that as many come as were asked for, evenly, before the last call.

    Every scheduler makes at least as many calls as steps; previews beyond the number asked for are not passed on.
    """
    return max(1, num_steps // (num_partials + 1)) if num_partials else None


def _count(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(name, "must be a whole number", shown(value))
    if not least <= value <= most:
        raise InvalidRequestError(name, f"must be in [{least}, {most}]", shown(value))
    return value


def _size(value: Any) -> tuple[int | None, int | None]:
    """Width and height; None where the model's own is wanted."""
    if value == "auto":
        return None, None
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise InvalidRequestError("size", "must be auto or WIDTHxHEIGHT, such as 512x512", shown(value))
    return int(match[1]), int(match[2])


def _format(said: dict[str, Any]) -> str:
    """The format's name; Azure's dialect of the API says it in `response_format`."""
    transport = one_of("response_format", said.get("response_format", "b64_json"), ("b64_json", "url", "png", "jpeg", "jpg"))
    if transport == "url":
        raise InvalidRequestError("response_format", "must be b64_json: this server keeps no files to point to")
    named = one_of("output_format", said.get("output_format", "png"), tuple(FORMATS))
    if transport in FORMATS:
        if said.get("output_format") is not None and FORMATS[named] is not FORMATS[transport]:
            raise InvalidRequestError("response_format", "contradicts output_format", shown(transport))
        named = transport
    return "jpeg" if named == "jpg" else named


def _compression(said: dict[str, Any], name: str) -> int | None:
    value = said.get("output_compression")
    if value is None:
        return None
    quality = _count("output_compression", value, 0, 100)
    if name == "png":
        if quality != 100:
            raise InvalidRequestError("output_compression", "is for jpeg and webp only", "png")
        return None
    return max(1, quality)


def _num_partials(said: dict[str, Any], num_images: int) -> int | None:
    is_stream = said.get("stream", False)
    if not isinstance(is_stream, bool):
        raise InvalidRequestError("stream", "must be true or false", shown(is_stream))
    num_partials = _count("partial_images", said.get("partial_images", 0), 0, MAX_PARTIAL_IMAGES)
    if not is_stream:
        if num_partials:
            raise InvalidRequestError("partial_images", "needs stream to be true")
        return None
    if num_images > 1:
        raise InvalidRequestError("stream", "needs n to be 1: its events do not say which image they are of")
    return num_partials

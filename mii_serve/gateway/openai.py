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
from mii_serve.gateway.links import KeptPictures, base_url
from mii_serve.gateway.names import ModelNames
from mii_serve.gateway.parameters import settled, whole
from mii_serve.gateway.pictures import as_json, as_text, check_budget, draw, is_blocked, nsfw_flag, relocate
from mii_serve.gateway.problems import Blocked, ImagesHeldBackError, envelope, openai_problem, problem_headers
from mii_serve.proto.codec import encode_request
from mii_serve.proto.dropped import DROPPED
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
EFFECTIVE = (
    *(
        "num_inference_steps",
        "guidance_scale",
        "scheduler",
        "scheduler_class",
        "seed",
        "engine",
        "dtype",
        "model",
        "model_revision",
    ),
    *DROPPED,
)
"""Members of an answer's `parameters`."""
FORMATS = {"png": ImageFormat.PNG, "jpeg": ImageFormat.JPEG, "jpg": ImageFormat.JPEG, "webp": ImageFormat.WEBP}
KNOWN = (
    *("prompt", "model", "n", "size", "quality", "response_format", "output_format", "output_compression", "background"),
    *("stream", "partial_images", *OURS, *IGNORED),
)
_SIZE = re.compile(r"\s*(\d{1,9})\s*[xX×]\s*(\d{1,9})\s*", re.ASCII)
_PATHS = {"num_images_per_prompt": "n", "output.quality": "output_compression"}
_STREAM_PATHS = {**_PATHS, "output.preview_every": "partial_images"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesRequest:
    """A body, read. `num_partials` is None where no stream was asked for."""

    message: pb.GenerateRequest
    format: str
    has_base64: bool
    has_url: bool
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

    def __init__(self, desk: Desk, settings: HttpConfig, names: ModelNames, kept: KeptPictures) -> None:
        """Pictures that are asked for by `url` go to `kept`."""
        self._desk = desk
        self._settings = settings
        self._names = names
        self._kept = kept

    async def __call__(self, call: Call) -> Response | EventStream:
        body = an_object("", call.body)
        for name in (call.request.path_params.get("deployment"), body.get("model")):
            if name not in (None, ""):
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
            rule = str(error).removeprefix(f"{error.field}: ")
            if error.field in ("height", "width"):
                raise InvalidRequestError("size", f"{error.field} {rule}") from None
            relocate(error, _STREAM_PATHS)
            raise

    async def _whole(self, call: Call, asked: ImagesRequest) -> Response:
        answer = await draw(self._desk, call, asked.message)
        self._refuse_if_all_held_back(answer.images)
        urls = list[str]()
        if asked.has_url:
            base = base_url(call.request, self._settings.public_url)
            shown = (image.data if not is_blocked(image) else None for image in answer.images)
            urls = ["" if data is None else base + self._kept.keep(data, asked.format) for data in shown]
        return Response(await asyncio.to_thread(_rendered, answer, asked, urls), 200, media_type="application/json")

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
                        told |= {"partial_image_index": num_shown, "nsfw_content_detected": nsfw_flag(event.preview)}
                        yield await asyncio.to_thread(_event, told["type"], told)
                        num_shown += 1
                    case "image":
                        images.append(event.image)
                    case "done":
                        self._refuse_if_all_held_back(images)
                        told = _told("completed", asked, images[0])
                        extra = {"usage": _NO_USAGE, **_facts(images[0]), "parameters": _parameters(event.done.parameters)}
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
        return JSONResponse({"object": "list", "data": [self._model(name) for name in await self._names.all()]})

    async def one(self, call: Call) -> Response:
        return JSONResponse(self._model(await self._names.check(call.request.path_params["model"])))

    def _model(self, model: str) -> dict[str, Any]:
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


def _rendered(answer: pb.GenerateResponse, asked: ImagesRequest, urls: Sequence[str]) -> bytes:
    texts = ["" if is_blocked(image) else as_text(image.data) for image in answer.images] if asked.has_base64 else []
    items = [_facts(image) for image in answer.images]
    for name, values in (("b64_json", texts), ("url", urls)):
        for item, value in zip(items, values, strict=False):
            item[name] = value
    done = answer.parameters
    return as_json(
        {
            "created": int(time.time()),
            "data": items,
            "background": "opaque",
            "output_format": asked.format,
            "quality": asked.quality,
            "size": f"{done.width}x{done.height}",
            **({"image": texts[0]} if texts else {}),
            "parameters": _parameters(done),
        }
    )


def _facts(image: pb.GeneratedImage) -> dict[str, Any]:
    """What is told of a picture beside itself; nothing of content safety where the server has none."""
    told: dict[str, Any] = {"seed": image.seed, "nsfw_content_detected": nsfw_flag(image)}
    if image.HasField("moderation_blocked"):
        told["moderation_blocked"] = image.moderation_blocked
    return told


def _parameters(done: pb.EffectiveParameters) -> dict[str, Any]:
    """What was really done."""
    return {name: getattr(done, name) for name in EFFECTIVE}


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
    """What a body asks for; null is not said, nor is an empty text for anything but the prompt.

    Raises:
        InvalidRequestError: naming the member and the rule.
    """
    no_others("", body, (*KNOWN, "image_prompt"))
    said = settled({name: value for name, value in body.items() if value is not None and (value != "" or name == "prompt")})
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
    name, has_base64, has_url = _format(said)
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
    return ImagesRequest(
        message=encode_request(asked, output),
        format=name,
        has_base64=has_base64,
        has_url=has_url,
        quality=quality,
        num_partials=num_partials,
    )


def _preview_every(num_steps: int, num_partials: int | None) -> int | None:
    """UNet calls between previews, so that as many come as were asked for, evenly, before the last call.

    Every scheduler makes at least as many calls as steps; previews beyond the number asked for are not passed on.
    """
    return max(1, num_steps // (num_partials + 1)) if num_partials else None


def _count(name: str, value: Any, least: int, most: int) -> int:
    value = whole(value)
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


def _format(said: dict[str, Any]) -> tuple[str, bool, bool]:
    """The format's name, and whether it comes as base64 and as a link; Azure's dialect names the format in `response_format`.

    Who says nothing gets both, because the API's older models answer with a link and its newer ones, which alone have
    `output_format`, with base64.
    """
    transport = said.get("response_format")
    if transport is not None:
        one_of("response_format", transport, ("b64_json", "url", "png", "jpeg", "jpg"))
    if transport == "url" and said.get("stream") is True:
        raise InvalidRequestError("response_format", "must be b64_json in a stream", shown(transport))
    named = one_of("output_format", said.get("output_format", "png"), tuple(FORMATS))
    if transport in FORMATS:
        if said.get("output_format") is not None and FORMATS[named] is not FORMATS[transport]:
            raise InvalidRequestError("response_format", "contradicts output_format", shown(transport))
        named = transport
    has_url = transport == "url" or (transport is None and "output_format" not in said)
    return "jpeg" if named == "jpg" else named, transport != "url", has_url


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

"""OpenAI's images API, and Azure's dialect of it for Stability's models: `POST /v1/images/generations` and its other addresses.

A member of the API has its effect, or is refused by name; four have none, because leaving it out does no harm.
Beside the API's own members, parameters have the names they have in diffusers.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator
from starlette.responses import JSONResponse, Response

from mii_serve.config import HttpConfig
from mii_serve.errors import InvalidRequestError, MiiServeError, UnauthenticatedError
from mii_serve.gateway.errors import Blocked, ImagesHeldBackError, envelope, openai_problem, problem_headers
from mii_serve.gateway.generation import check_budget, relocate, to_base64, to_json
from mii_serve.gateway.image_links import ImageStore, base_url
from mii_serve.gateway.json_body import WholeNumber, broken_rule, one_of, shown, validated
from mii_serve.gateway.middleware import EventStream, HttpCall
from mii_serve.gateway.parameters import Parameters, names_without, requested, with_parameters
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.dropped_text import DROPPED
from mii_serve.server.model_names import ModelNames
from mii_serve.types import (
    Capabilities,
    Done,
    EffectiveParameters,
    GenerationAnswer,
    GenerationRequest,
    ImageFormat,
    ImageReady,
    OutputOptions,
    Preview,
    Queued,
    Started,
)

MAX_N = 10
MAX_PARTIAL_IMAGES = 3
IMAGES_PARAMETERS = names_without("prompt", "height", "width", "num_images_per_prompt")
"""Members that the API does not have; the others have a name of its own there."""
QUALITIES = {"auto": 1.0, "standard": 1.0, "low": 0.5, "medium": 1.0, "high": 1.5, "hd": 1.5, "xhigh": 2.0, "max": 2.0}
"""Times the model's own number of steps, where the request names none."""
EFFECTIVE = (
    *names_without("prompt", "negative_prompt", "height", "width", "num_images_per_prompt"),
    *("loras", "scheduler_class", "engine", "dtype", "model", "model_revision"),
    *DROPPED,
)
"""Members of an answer's `parameters`."""
FORMATS = {"png": ImageFormat.PNG, "jpeg": ImageFormat.JPEG, "jpg": ImageFormat.JPEG, "webp": ImageFormat.WEBP}
_SIZE = re.compile(r"\s*(\d{1,9})\s*[xX×]\s*(\d{1,9})\s*", re.ASCII)
_PATHS = {
    "mask_image": "mask",
    "num_images_per_prompt": "n",
    "output.quality": "output_compression",
    "output.preview_every": "partial_images",
}


def _size(value: Any) -> tuple[int, int] | None:
    """Width and height; None where the model's own is wanted."""
    if value == "auto":
        return None
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise broken_rule("must be auto or WIDTHxHEIGHT, such as 512x512")
    return int(match[1]), int(match[2])


class _ImagesBody(Parameters):
    unsupported: ClassVar = Parameters.unsupported | {
        "image_prompt": "is not supported: this server makes pictures from text only"
    }

    prompt: str
    model: str | None = None
    n: Annotated[WholeNumber, Field(ge=1, le=MAX_N)] = 1
    size: Annotated[tuple[int, int] | None, PlainValidator(_size)] = None
    quality: Annotated[str, one_of(QUALITIES)] = "auto"
    response_format: Annotated[str, one_of(("b64_json", "url", "png", "jpeg", "jpg"))] | None = None
    output_format: Annotated[str, one_of(FORMATS)] | None = None
    output_compression: Annotated[WholeNumber, Field(ge=0, le=100)] | None = None
    background: Annotated[str, one_of(("auto", "opaque"))] = "auto"
    stream: bool = False
    partial_images: Annotated[WholeNumber, Field(ge=0, le=MAX_PARTIAL_IMAGES)] = 0
    # without effect: who asks, a wish for less moderation, and the styles of another model
    user: str | None = None
    safety_identifier: str | None = None
    moderation: Annotated[str, one_of(("low", "auto"))] | None = None
    style: Annotated[str, one_of(("vivid", "natural"))] | None = None

    @classmethod
    def prepared(cls, members: dict[str, Any]) -> dict[str, Any]:
        """null is the same as left out, and so is an empty text for anything but the prompt."""
        return {name: value for name, value in members.items() if value is not None and (value != "" or name == "prompt")}


ImagesBody = with_parameters(_ImagesBody, IMAGES_PARAMETERS)


class ImageBody(_ImagesBody):
    """Of requests that start from an image."""

    unsupported: ClassVar = Parameters.unsupported | {
        "input_fidelity": "is not supported: strength says how far the result may leave the image",
    }

    strength: float | None = None


class _VariationsBody(ImageBody):
    prompt: str = ""


EditsBody = with_parameters(ImageBody, IMAGES_PARAMETERS)
"""The fields of a form with an image, once numbers are numbers."""
VariationsBody = with_parameters(_VariationsBody, IMAGES_PARAMETERS)
"""The same without a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesRequest:
    """What a body asks for. `num_partials` is None where no stream was asked for."""

    generation: GenerationRequest
    format: str
    has_base64: bool
    has_url: bool
    quality: str
    num_partials: int | None


class OpenAiDialect:
    """Errors as OpenAI's clients read them."""

    def refusal(self, error: MiiServeError, request_id: str) -> Response:
        problem = openai_problem(error)
        return JSONResponse(_body(error), problem.status, problem_headers(problem))

    def last_event(self, error: MiiServeError, request_id: str) -> bytes:
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

    def __init__(self, dispatcher: Dispatcher, settings: HttpConfig, names: ModelNames, store: ImageStore) -> None:
        """Images that are asked for by `url` go to the `store`."""
        self._dispatcher = dispatcher
        self._settings = settings
        self._names = names
        self._store = store

    async def __call__(self, call: HttpCall) -> Response | EventStream:
        return await self.answer(call, validated(ImagesBody, call.body))

    async def answer(self, call: HttpCall, body: _ImagesBody, **images: Any) -> Response | EventStream:
        """`images` are parameters of the request beside those of the body."""
        for name in (call.request.path_params.get("deployment"), body.model):
            if name:
                await self._names.check(name)
        capabilities = self._dispatcher.capabilities
        request = parse(body, capabilities)
        if images:
            generation = request.generation
            generation = replace(generation, params=replace(generation.params, **images))
            request = replace(request, generation=generation)
        call.context.log["is_stream"] = request.num_partials is not None
        check_budget(self._settings, [request.generation], capabilities.defaults.num_inference_steps)
        try:
            if request.num_partials is None:
                return await self._whole(call, request)
            return await self._stream(call, request, request.num_partials)
        except InvalidRequestError as error:
            rule = str(error).removeprefix(f"{error.field}: ")
            if error.field in ("height", "width"):
                raise InvalidRequestError("size", f"{error.field} {rule}") from None
            relocate(error, _PATHS)
            raise

    async def _whole(self, call: HttpCall, request: ImagesRequest) -> Response:
        answer = await self._dispatcher.generate(request.generation, call.context)
        self._refuse_if_all_held_back(answer.images)
        urls = list[str]()
        if request.has_url:
            base = base_url(call.request, self._settings.public_url)
            urls = [
                "" if image.moderation_blocked else base + self._store.add(image.encoded, request.format)
                for image in answer.images
            ]
        return Response(await asyncio.to_thread(_to_json, answer, request, urls), 200, media_type="application/json")

    async def _stream(self, call: HttpCall, request: ImagesRequest, num_partials: int) -> EventStream:
        """Begin, so that a request that is refused has the status of an error; the rest follows as it happens."""
        pieces = self._pieces(call, request, num_partials)
        try:
            await anext(pieces)
        except BaseException:
            await pieces.aclose()
            raise
        return EventStream(pieces)

    async def _pieces(self, call: HttpCall, request: ImagesRequest, num_partials: int) -> AsyncGenerator[bytes, None]:
        """A comment once the request is accepted; then the partial images and the whole one."""
        num_shown, images = 0, list[ImageReady]()
        generation = self._dispatcher.events(request.generation, call.context, has_steps=False)
        async with contextlib.aclosing(generation) as events:
            async for event in events:
                match event:
                    case Queued() | Started():
                        yield b": working\n\n"
                    case Preview() if num_shown < num_partials:
                        members = _image_members("partial_image", request, event)
                        members |= {"partial_image_index": num_shown, "nsfw_content_detected": event.nsfw_content_detected}
                        yield await asyncio.to_thread(_event, members["type"], members)
                        num_shown += 1
                    case ImageReady():
                        images.append(event)
                    case Done():
                        self._refuse_if_all_held_back(images)
                        members = _image_members("completed", request, images[0])
                        members |= {"usage": _NO_USAGE, **_facts(images[0]), "parameters": _parameters(event.parameters)}
                        yield await asyncio.to_thread(_event, members["type"], members)

    def _refuse_if_all_held_back(self, images: Sequence[ImageReady]) -> None:
        if all(image.moderation_blocked for image in images):
            raise ImagesHeldBackError("Content safety blocked every picture.", "moderation")
        if self._settings.refuse_flagged_images and all(
            image.nsfw_content_detected or image.moderation_blocked for image in images
        ):
            raise ImagesHeldBackError("The model's safety checker fired on every picture.", "nsfw")


class Models:
    """The answers to `GET /v1/models` and `GET /v1/models/{model}`."""

    def __init__(self, names: ModelNames) -> None:
        self._names = names

    async def all(self, call: HttpCall) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in await self._names.all()]})

    async def one(self, call: HttpCall) -> Response:
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


def _to_json(answer: GenerationAnswer, request: ImagesRequest, urls: Sequence[str]) -> bytes:
    texts = list[str]()
    if request.has_base64:
        texts = ["" if image.moderation_blocked else to_base64(image.encoded) for image in answer.images]
    items = [_facts(image) for image in answer.images]
    for name, values in (("b64_json", texts), ("url", urls)):
        for item, value in zip(items, values, strict=False):
            item[name] = value
    done = answer.parameters
    return to_json(
        {
            "created": int(time.time()),
            "data": items,
            "background": "opaque",
            "output_format": request.format,
            "quality": request.quality,
            "size": f"{done.width}x{done.height}",
            **({"image": texts[0]} if texts else {}),
            "parameters": _parameters(done),
        }
    )


def _facts(image: ImageReady) -> dict[str, Any]:
    """The members of an image beside itself; nothing of content safety where the server has none."""
    facts: dict[str, Any] = {"seed": image.seed, "nsfw_content_detected": image.nsfw_content_detected}
    if image.moderation_blocked is not None:
        facts["moderation_blocked"] = image.moderation_blocked
    return facts


def _parameters(done: EffectiveParameters) -> dict[str, Any]:
    """What was really done."""
    return {name: getattr(done, name) for name in EFFECTIVE}


def _image_members(kind: str, request: ImagesRequest, image: ImageReady | Preview) -> dict[str, Any]:
    return {
        "type": f"image_generation.{kind}",
        "b64_json": to_base64(image.encoded),
        "background": "opaque",
        "created_at": int(time.time()),
        "output_format": request.format,
        "quality": request.quality,
        "size": f"{image.width}x{image.height}",
    }


def _event(name: str, value: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + to_json(value) + b"\n\n"


# ---- reading the body --------------------------------------------------------------------------------------------


def parse(body: _ImagesBody, capabilities: Capabilities) -> ImagesRequest:
    """What a body asks for.

    Raises:
        InvalidRequestError: members contradict each other.
    """
    given = body.given()
    if "num_inference_steps" not in given and QUALITIES[body.quality] != 1.0:
        wanted = round(capabilities.defaults.num_inference_steps * QUALITIES[body.quality])
        given["num_inference_steps"] = min(capabilities.limits.max_num_inference_steps, max(1, wanted))
    width, height = body.size or (None, None)
    image_format, has_base64, has_url = _format(body)
    num_partials = _num_partials(body)
    output = OutputOptions(
        format=FORMATS[image_format],
        quality=_compression(body, image_format),
        preview_every=_preview_every(given.get("num_inference_steps", capabilities.defaults.num_inference_steps), num_partials),
    )
    more = {"prompt": body.prompt, "height": height, "width": width, "num_images_per_prompt": body.n}
    return ImagesRequest(
        generation=GenerationRequest(params=requested({**given, **more}), output=output),
        format=image_format,
        has_base64=has_base64,
        has_url=has_url,
        quality=body.quality,
        num_partials=num_partials,
    )


def _preview_every(num_steps: int, num_partials: int | None) -> int | None:
    """UNet calls between previews, so that as many come as were asked for, evenly, before the last call.

    Every scheduler makes at least as many calls as steps; previews beyond the number asked for are not passed on.
    """
    return max(1, num_steps // (num_partials + 1)) if num_partials else None


def _format(body: _ImagesBody) -> tuple[str, bool, bool]:
    """The format's name, and whether it comes as base64 and as a link; Azure's dialect names the format in `response_format`.

    A body that says neither gets both, because the API's older models answer with a link and its newer ones, which alone have
    `output_format`, with base64.
    """
    transport, name = body.response_format, body.output_format or "png"
    if transport == "url" and body.stream:
        raise InvalidRequestError("response_format", "must be b64_json in a stream", shown(transport))
    if transport in FORMATS:
        if body.output_format is not None and FORMATS[name] is not FORMATS[transport]:
            raise InvalidRequestError("response_format", "contradicts output_format", shown(transport))
        name = transport
    has_url = transport == "url" or (transport is None and body.output_format is None)
    return "jpeg" if name == "jpg" else name, transport != "url", has_url


def _compression(body: _ImagesBody, image_format: str) -> int | None:
    quality = body.output_compression
    if quality is None or image_format != "png":
        return None if quality is None else max(1, quality)
    if quality != 100:
        raise InvalidRequestError("output_compression", "is for jpeg and webp only", "png")
    return None


def _num_partials(body: _ImagesBody) -> int | None:
    if not body.stream:
        if body.partial_images:
            raise InvalidRequestError("partial_images", "needs stream to be true")
        return None
    if body.n > 1:
        raise InvalidRequestError("stream", "needs n to be 1: its events do not say which image they are of")
    return body.partial_images

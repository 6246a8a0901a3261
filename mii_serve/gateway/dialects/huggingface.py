"""Hugging Face's tasks text-to-image and image-to-image: `{"inputs", "parameters"}` in, the bytes of one image out.

`huggingface_hub.InferenceClient` and everything that speaks to an Inference Endpoint works with it. Which of the two tasks a
body is for shows in itself, because a model there has only one: the inputs of image-to-image are an image in base64, or the
whole body is one.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mii_serve.config import HttpConfig
from mii_serve.errors import InvalidRequestError, MiiServeError
from mii_serve.gateway.errors import ImagesHeldBackError, MediaTypeError, NotAcceptableError, problem_headers, problem_of
from mii_serve.gateway.generation import check_budget, relocate
from mii_serve.gateway.json_body import FILE_TIMEOUT_S, JsonObject, WholeNumber, read_json, read_raw, validated
from mii_serve.gateway.middleware import HttpCall
from mii_serve.gateway.parameters import Parameters, names_without, requested, with_parameters
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.dropped_text import dropped_headers
from mii_serve.server.model_names import ModelNames
from mii_serve.types import MAX_IMAGE_BYTES, GenerationRequest, ImageFormat, OutputOptions

TASK_PARAMETERS = names_without("prompt", "num_images_per_prompt")
MEDIA_TYPES = {"image/png": ImageFormat.PNG, "image/jpeg": ImageFormat.JPEG, "image/webp": ImageFormat.WEBP}
"""The first is the answer to whom any will do."""
IMAGE_PARAMETERS = ("prompt", "strength", "target_size", "mask_image")
"""Those of image-to-image alone; `mask_image`, in base64 as the inputs, is an addition."""
MAX_BODY_BYTES = 4 * MAX_IMAGE_BYTES // 3 + 1024 * 1024
"""Of one with images in base64."""
_FILE = re.compile(r"(?:data:image/[a-z]{1,10};base64,)?(?=iVBORw0KGgo|/9j/|UklGR)([A-Za-z0-9+/]{64,}={0,2})", re.ASCII)
"""A PNG, JPEG or WebP in base64, by how it begins; no prompt looks like this."""
_SIGNATURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"RIFF")


class TargetSize(JsonObject):
    width: WholeNumber
    height: WholeNumber


class _TaskParameters(Parameters):
    strength: float | None = None
    target_size: TargetSize | None = None
    mask_image: str | None = None


TaskParameters = with_parameters(_TaskParameters, (*TASK_PARAMETERS, "prompt"))


class TaskOptions(JsonObject):
    """How Hugging Face's own servers wait and cache, which does not apply here."""

    use_cache: bool = True
    wait_for_model: bool = True
    use_gpu: bool = True


class TaskBody(JsonObject):
    inputs: str
    parameters: TaskParameters | None = None  # type: ignore[valid-type]
    options: TaskOptions | None = None


_PATHS = {"prompt": "inputs", **{name: f"parameters.{name}" for name in TASK_PARAMETERS}}
_IMAGE_PATHS = {**_PATHS, "image": "inputs", **{name: f"parameters.{name}" for name in IMAGE_PARAMETERS}}


async def read_task(request: Request, max_bytes: int) -> Any:
    """The JSON value of a body, or the bytes of one that is an image itself.

    Raises:
        BodyTooLargeError, MediaTypeError, InvalidRequestError: naming the rule.
        RequestCancelledError: the caller left before the body was complete.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type.startswith("image/") or media_type == "application/octet-stream":
        return await read_raw(request, MAX_IMAGE_BYTES, FILE_TIMEOUT_S)
    if not media_type:  # bytes whose kind the client does not know
        if (raw := await read_raw(request, MAX_IMAGE_BYTES, FILE_TIMEOUT_S)).startswith(_SIGNATURES):
            return raw
        raise MediaTypeError("content-type", "must be application/json, or the body an image", "nothing")
    return await read_json(request, max_bytes, MAX_BODY_BYTES)


class HuggingFaceDialect:
    """`error` is a text; what else clients of Hugging Face read is the status."""

    def refusal(self, error: MiiServeError, request_id: str) -> Response:
        problem = problem_of(error, failed=500, late=424)
        body = {"error": problem.message, "error_type": problem.code}
        return JSONResponse(body, problem.status, problem_headers(problem))

    def last_event(self, error: MiiServeError, request_id: str) -> bytes:
        raise AssertionError("no answer of this task is a stream")


class Tasks:
    """The answer to `POST /` and `POST /models/{model}`."""

    def __init__(self, dispatcher: Dispatcher, settings: HttpConfig, names: ModelNames) -> None:
        self._dispatcher = dispatcher
        self._settings = settings
        self._names = names

    async def __call__(self, call: HttpCall) -> Response:
        if (name := call.request.path_params.get("model")) is not None:
            await self._names.check(name)
        media_type = accepted(call.request.headers.get("accept", "*/*"))
        request = await asyncio.to_thread(parse, call.body, MEDIA_TYPES[media_type])
        check_budget(self._settings, [request], self._dispatcher.capabilities.defaults.num_inference_steps)
        try:
            answer = await self._dispatcher.generate(request, call.context)
        except InvalidRequestError as error:
            relocate(error, _PATHS if request.params.image is None else _IMAGE_PATHS)
            raise
        [image] = answer.images
        if image.moderation_blocked:
            raise ImagesHeldBackError("content safety blocked the picture", "moderation")
        headers = {"x-mii-seed": str(image.seed), **dropped_headers([answer.parameters])}
        if (flag := image.nsfw_content_detected) is not None:
            headers["x-mii-nsfw-content-detected"] = "true" if flag else "false"
        return Response(image.encoded, 200, headers, media_type)


def parse(body: object, image_format: ImageFormat) -> GenerationRequest:
    """The request that a body asks for, of either task.

    Raises:
        InvalidRequestError: naming the member and the rule.
    """
    output = OutputOptions(format=image_format)
    if isinstance(body, bytes):
        return GenerationRequest(params=replace(requested({}), image=body), output=output)
    task = validated(TaskBody, body)
    parameters: Any = task.parameters
    given: dict[str, Any] = {} if parameters is None else parameters.given()
    is_about_image = parameters is not None and any(getattr(parameters, name) is not None for name in IMAGE_PARAMETERS)
    if not is_about_image and _FILE.fullmatch(task.inputs) is None:
        return GenerationRequest(params=requested({**given, "prompt": task.inputs}), output=output)
    images: dict[str, Any] = {"image": _file("inputs", task.inputs)}
    if parameters is not None:
        images["strength"] = parameters.strength
        if parameters.mask_image is not None:
            images["mask_image"] = _file("parameters.mask_image", parameters.mask_image)
        if (size := parameters.target_size) is not None:
            if "height" in given or "width" in given:
                raise InvalidRequestError("parameters.target_size", "must not come with height or width")
            given |= {"height": size.height, "width": size.width}
    return GenerationRequest(params=replace(requested(given), **images), output=output)


def _file(member: str, text: str) -> bytes:
    try:
        return base64.b64decode(text.partition(";base64,")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequestError(member, "must be the file of an image in base64") from None


def accepted(accept: str) -> str:
    """The media type to answer with.

    Raises:
        NotAcceptableError: the caller accepts none of ours.
    """
    best, best_weight = "", 0.0
    for part in accept.split(","):
        wanted, *options = (word.strip().lower() for word in part.split(";"))
        matching = [name for name in MEDIA_TYPES if wanted in (name, "image/*", "*/*", "*", "")]
        if matching and (weight := _weight(options)) > best_weight:
            best, best_weight = matching[0], weight
    if not best:
        raise NotAcceptableError("accept", f"must allow one of {', '.join(MEDIA_TYPES)}", repr(accept[:80]))
    return best


def _weight(options: list[str]) -> float:
    for option in options:
        name, _, value = option.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0

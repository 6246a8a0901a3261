"""Hugging Face's text-to-image task: `{"inputs", "parameters"}` in, the bytes of one image out.

`huggingface_hub.InferenceClient` and everything that speaks to an Inference Endpoint works with it.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from mii_serve.config import HttpConfig
from mii_serve.errors import InvalidRequestError, MiiServeError
from mii_serve.gateway.errors import ImagesHeldBackError, NotAcceptableError, problem_headers, problem_of
from mii_serve.gateway.generation import check_budget, relocate
from mii_serve.gateway.json_body import JsonObject, validated
from mii_serve.gateway.middleware import HttpCall
from mii_serve.gateway.parameters import Parameters, names_without, requested, with_parameters
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.dropped_text import dropped_headers
from mii_serve.server.model_names import ModelNames
from mii_serve.types import GenerationRequest, ImageFormat, OutputOptions

TASK_PARAMETERS = names_without("prompt", "num_images_per_prompt")
MEDIA_TYPES = {"image/png": ImageFormat.PNG, "image/jpeg": ImageFormat.JPEG, "image/webp": ImageFormat.WEBP}
"""The first is the answer to whom any will do."""


TaskParameters = with_parameters(Parameters, TASK_PARAMETERS)


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


class HuggingFaceDialect:
    """`error` is a text; what else clients of Hugging Face read is the status."""

    def refusal(self, error: MiiServeError, request_id: str) -> Response:
        problem = problem_of(error, failed=500, late=424)
        body = {"error": problem.message, "error_type": problem.code}
        return JSONResponse(body, problem.status, problem_headers(problem))

    def last_event(self, error: MiiServeError, request_id: str) -> bytes:
        raise AssertionError("no answer of this task is a stream")


class TextToImage:
    """The answer to `POST /` and `POST /models/{model}`."""

    def __init__(self, dispatcher: Dispatcher, settings: HttpConfig, names: ModelNames) -> None:
        self._dispatcher = dispatcher
        self._settings = settings
        self._names = names

    async def __call__(self, call: HttpCall) -> Response:
        if (name := call.request.path_params.get("model")) is not None:
            await self._names.check(name)
        media_type = accepted(call.request.headers.get("accept", "*/*"))
        request = parse(call.body, MEDIA_TYPES[media_type])
        check_budget(self._settings, [request], self._dispatcher.capabilities.defaults.num_inference_steps)
        try:
            answer = await self._dispatcher.generate(request, call.context)
        except InvalidRequestError as error:
            relocate(error, _PATHS)
            raise
        [image] = answer.images
        if image.moderation_blocked:
            raise ImagesHeldBackError("content safety blocked the picture", "moderation")
        headers = {"x-mii-seed": str(image.seed), **dropped_headers([answer.parameters])}
        if (flag := image.nsfw_content_detected) is not None:
            headers["x-mii-nsfw-content-detected"] = "true" if flag else "false"
        return Response(image.encoded, 200, headers, media_type)


def parse(body: object, image_format: ImageFormat) -> GenerationRequest:
    """The request that a body asks for.

    Raises:
        InvalidRequestError: naming the member and the rule.
    """
    task = validated(TaskBody, body)
    given: dict[str, Any] = {} if task.parameters is None else task.parameters.given()
    return GenerationRequest(params=requested({**given, "prompt": task.inputs}), output=OutputOptions(format=image_format))


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

"""Hugging Face's text-to-image task: `{"inputs", "parameters"}` in, the bytes of one picture out.

`huggingface_hub.InferenceClient` and everything that speaks to an Inference Endpoint works with it.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from mii_serve.config import HttpConfig
from mii_serve.errors import InvalidRequestError, MiiServeError
from mii_serve.gateway.bodies import a_text, an_object, no_others, shown
from mii_serve.gateway.door import Call
from mii_serve.gateway.names import ModelNames
from mii_serve.gateway.parameters import settled
from mii_serve.gateway.pictures import check_budget, draw, is_blocked, nsfw_flag, relocate
from mii_serve.gateway.problems import ImagesHeldBackError, NotAcceptableError, problem_headers, problem_of
from mii_serve.proto.codec import encode_request
from mii_serve.proto.dropped import dropped_headers
from mii_serve.server.desk import Desk
from mii_serve.types import ImageFormat, OutputOptions, RequestedParams

PARAMETERS = ("negative_prompt", "height", "width", "num_inference_steps", "guidance_scale", "scheduler", "seed")
OPTIONS = ("use_cache", "wait_for_model", "use_gpu")
"""How Hugging Face's own servers wait and cache. Here is nothing to wait for."""
MEDIA_TYPES = {"image/png": ImageFormat.PNG, "image/jpeg": ImageFormat.JPEG, "image/webp": ImageFormat.WEBP}
"""The first is the answer to whom any will do."""


class HuggingFaceDialect:
    """`error` is a text; what else clients of Hugging Face read is the status."""

    def refusal(self, error: MiiServeError) -> Response:
        problem = problem_of(error, failed=500, late=424)
        body = {"error": problem.message, "error_type": problem.code}
        return JSONResponse(body, problem.status, problem_headers(problem))

    def broken_off(self, error: MiiServeError) -> bytes:
        raise AssertionError("no answer of this task is a stream")


class TextToImage:
    """The answer to `POST /` and `POST /models/{model}`."""

    def __init__(self, desk: Desk, settings: HttpConfig, names: ModelNames) -> None:
        self._desk = desk
        self._settings = settings
        self._names = names

    async def __call__(self, call: Call) -> Response:
        if (name := call.request.path_params.get("model")) is not None:
            await self._names.check(name)
        media_type = accepted(call.request.headers.get("accept", "*/*"))
        asked, paths = _parsed(call.body)
        try:
            message = encode_request(asked, OutputOptions(format=MEDIA_TYPES[media_type]))
            check_budget(self._settings, [message], self._desk.capabilities.defaults.num_inference_steps)
            answer = await draw(self._desk, call, message)
        except InvalidRequestError as error:
            relocate(error, paths)
            raise
        [image] = answer.images
        if is_blocked(image):
            raise ImagesHeldBackError("content safety blocked the picture", "moderation")
        headers = {"x-mii-seed": str(image.seed), **dropped_headers([answer.parameters])}
        if (flag := nsfw_flag(image)) is not None:
            headers["x-mii-nsfw-content-detected"] = "true" if flag else "false"
        return Response(image.data, 200, headers, media_type)


def accepted(accept: str) -> str:
    """The media type to answer with.

    Raises:
        NotAcceptableError: the caller wants none that we have.
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


def _parsed(body: Any) -> tuple[RequestedParams, dict[str, str]]:
    top = an_object("", body)
    no_others("", top, ("inputs", "parameters", "options"))
    if "inputs" not in top:
        raise InvalidRequestError("inputs", "is missing")
    prompt = a_text("inputs", top["inputs"])
    parameters = an_object("parameters", {} if top.get("parameters") is None else top["parameters"])
    no_others("parameters", parameters, PARAMETERS)
    options = an_object("options", {} if top.get("options") is None else top["options"])
    no_others("options", options, OPTIONS)
    for name, value in options.items():
        if not isinstance(value, bool):
            raise InvalidRequestError(f"options.{name}", "must be true or false", shown(value))
    paths = {"prompt": "inputs", **{name: f"parameters.{name}" for name in PARAMETERS}}
    return RequestedParams(prompt=prompt, **settled(parameters)), paths

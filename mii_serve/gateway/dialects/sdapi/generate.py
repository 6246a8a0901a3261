"""The answers to `txt2img` and `img2img`: images in base64, the parameters of the request, and `info`, which is JSON in a text.

All images of a call are requests to the dispatcher, which makes them side by side in the same batch as everybody's.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from starlette.responses import Response

from mii_serve.config import HttpConfig
from mii_serve.errors import DeadlineExceededError, InvalidRequestError, NotFoundError, QueueFullError, RequestCancelledError
from mii_serve.gateway.dialects.sdapi.answer import FILES, Drawn, answer_to_json
from mii_serve.gateway.dialects.sdapi.body import (
    DENOISING_STRENGTH,
    OVERRIDE,
    CommonBody,
    Settings,
    TextBody,
    image_body,
    num_skipped_layers,
    settings_of,
    text_body,
)
from mii_serve.gateway.dialects.sdapi.drawing import Drawing
from mii_serve.gateway.dialects.sdapi.hires import Hires, hires_of
from mii_serve.gateway.dialects.sdapi.prompts import without_loras
from mii_serve.gateway.dialects.sdapi.samplers import Chosen, chosen
from mii_serve.gateway.dialects.sdapi.tasks import Task, Tasks
from mii_serve.gateway.errors import ImagesHeldBackError
from mii_serve.gateway.generation import relocate, too_many
from mii_serve.gateway.middleware import HttpCall
from mii_serve.server.call import CallContext
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.model_names import ModelNames
from mii_serve.types import (
    A1111,
    MAX_SEED,
    RANDOM_SEED,
    Capabilities,
    GenerationParams,
    GenerationRequest,
    ImageFormat,
    OutputOptions,
    RequestedParams,
    draw_seed,
)

MAX_PREVIEWS = 3
"""Each costs as much as the end of a picture."""
MAX_DECODING, MAX_PREPARING = 2, 64
"""Calls whose images are made ready at once, and those that wait for it, too."""
RETRY_AFTER_S = 2.0
FORMATS = {"png": ImageFormat.PNG, "jpg": ImageFormat.JPEG, "jpeg": ImageFormat.JPEG, "webp": ImageFormat.WEBP}
PATHS = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "num_images_per_prompt": "batch_size",
    "scheduler": "sampler_name",
    "strength": "denoising_strength",
    "image": "init_images[0]",
    "mask_image": "mask",
    "output.quality": f"{OVERRIDE}.jpeg_quality",
}


class Generations:
    """Answers calls that ask for images."""

    def __init__(self, dispatcher: Dispatcher, settings: HttpConfig, names: ModelNames, tasks: Tasks) -> None:
        self._dispatcher = dispatcher
        self._settings = settings
        self._names = names
        self._tasks = tasks
        self._decoding = asyncio.Semaphore(MAX_DECODING)
        self._num_preparing = 0

    async def text_to_image(self, call: HttpCall) -> Response:
        body = text_body(call.body)
        settings = settings_of(body)
        return await self._answer(call, body, settings, self._requested(body, settings), "scripts_txt2img")

    async def image_to_image(self, call: HttpCall) -> Response:
        from mii_serve.gateway.dialects.sdapi.images import input_images  # Pillow is for those who send images

        body = image_body(call.body)
        settings = settings_of(body)
        asked, picked = self._requested(body, settings)
        self._check_count(body)
        size = self._resolved(asked)  # before anything is decoded
        if self._num_preparing >= MAX_PREPARING:
            raise QueueFullError(f"the images of {MAX_PREPARING} requests wait to be read already", RETRY_AFTER_S)
        self._num_preparing += 1
        try:
            async with asyncio.timeout(call.context.left_s), self._decoding:
                image, mask = await asyncio.to_thread(input_images, body, size.width, size.height)
        except TimeoutError:
            raise DeadlineExceededError("the time ran out before the image was read") from None
        finally:
            self._num_preparing -= 1
        if not body.include_init_images:  # they would be kept until the answer
            body = body.model_copy(update={"init_images": [], "mask": None})
            for name in FILES:
                call.body.pop(name, None)
        strength = DENOISING_STRENGTH if body.denoising_strength is None else body.denoising_strength
        asked = replace(asked, height=size.height, width=size.width, image=image, mask_image=mask, strength=strength)
        return await self._answer(call, body, settings, (asked, picked), "scripts_img2img")

    def _requested(self, body: CommonBody, settings: Settings) -> tuple[RequestedParams, Chosen]:
        """The parameters of one image that the body names."""
        picked = chosen(body.sampler_name or body.sampler_index or "", body.scheduler, body.eta, self._dispatcher.capabilities)
        prompt, loras = without_loras(body.prompt, "prompt")
        asked = RequestedParams(
            prompt=prompt,
            loras=loras or None,
            clip_skip=num_skipped_layers(body, settings),
            eta=picked.eta,
            prompt_syntax=A1111,
            negative_prompt=body.negative_prompt,
            height=body.height,
            width=body.width,
            num_inference_steps=body.steps,
            guidance_scale=body.cfg_scale,
            scheduler=picked.scheduler,
            seed=draw_seed() if body.seed == RANDOM_SEED else body.seed,
        )
        return asked, picked

    async def _answer(
        self, call: HttpCall, body: CommonBody, settings: Settings, request: tuple[RequestedParams, Chosen], job: str
    ) -> Response:
        asked, picked = request
        await self._check_model(settings.sd_model_checkpoint)
        self._check_count(body)
        params, capabilities = self._resolved(asked), self._dispatcher.capabilities
        hires = hires_of(body, asked, params, capabilities) if isinstance(body, TextBody) else None
        output = _output(params, settings, call.context)
        firsts = output if hires is None else replace(output, format=ImageFormat.PNG, quality=None)
        requests = _requests(asked, body, params, firsts, capabilities)
        self._check_steps(body, params, hires)
        task = Task(
            owner=call.context.client,
            id=body.force_task_id or call.context.request_id,
            job=job,
            num_images=body.num_images if hires is None else 2 * body.num_images,
            batch_size=body.batch_size,
            num_steps=params.num_steps,
        )
        drawn = Drawn(params=params, chosen=picked, model=await self._model(), timestamp=task.timestamp, hires=hires)
        drawing = Drawing(self._dispatcher, call.context, task, drawn, asked, output)
        try:
            with self._tasks.running(task):
                await drawing.run(requests)
        except InvalidRequestError as error:
            raise _in_words(error) from None
        if not drawn.images:
            raise RequestCancelledError("the request was interrupted before an image was finished")
        if all(image.moderation_blocked for image in drawn.images.values()):
            raise ImagesHeldBackError("Content safety blocked every picture.", "moderation")
        content = await asyncio.to_thread(answer_to_json, body, call.body, drawn)
        return Response(content, 200, media_type="application/json")

    def _check_count(self, body: CommonBody) -> None:
        if body.num_images > self._settings.max_images:
            raise too_many("images", min(body.num_images, 10**9), self._settings.max_images)

    def _resolved(self, asked: RequestedParams) -> GenerationParams:
        """What the request means, checked in the words of this API."""
        try:
            return self._dispatcher.capabilities.resolve(asked, fallback_seed=0)
        except InvalidRequestError as error:
            raise _in_words(error) from None

    async def _check_model(self, name: str) -> None:
        if not name:
            return
        try:
            await self._names.check(name)
        except NotFoundError as error:
            raise InvalidRequestError(f"{OVERRIDE}.sd_model_checkpoint", f"must be left out, because {error}") from None

    async def _model(self) -> tuple[str, str]:
        """The model's name, and the short hash that stands for its revision."""
        return (await self._names.all())[0], short_hash((await self._names.info()).model_revision)

    def _check_steps(self, body: CommonBody, params: GenerationParams, hires: Hires | None) -> None:
        num_steps = params.num_inference_steps + (0 if hires is None else hires.num_inference_steps)
        if (count := body.num_images * num_steps) > self._settings.max_steps:
            raise too_many("denoising steps", count, self._settings.max_steps)


def _in_words(error: InvalidRequestError) -> InvalidRequestError:
    """The error, which names the member that this API has."""
    if error.field.startswith("loras"):
        return InvalidRequestError("prompt", str(error))
    relocate(error, PATHS)
    return error


def short_hash(revision: str) -> str:
    """Ten characters, as that API shows a model's hash."""
    return revision.rpartition(":")[2][:10]


def _output(params: GenerationParams, settings: Settings, context: CallContext) -> OutputOptions:
    image_format = FORMATS[settings.samples_format]
    preview_every = None
    if settings.preview_every is not None and context.idempotency_key is None:
        preview_every = min(1000, max(settings.preview_every, params.num_steps // (MAX_PREVIEWS + 1), 1))
    return OutputOptions(
        format=image_format,
        quality=None if image_format is ImageFormat.PNG else settings.jpeg_quality,
        embed_metadata=image_format is ImageFormat.PNG,
        preview_every=preview_every,
    )


def _requests(
    asked: RequestedParams, body: CommonBody, params: GenerationParams, output: OutputOptions, capabilities: Capabilities
) -> list[GenerationRequest]:
    """The images of a call as requests of as many images as one may have; image i has the seed `seed + i`."""
    most, requests, offset = capabilities.limits.max_images_per_prompt, list[GenerationRequest](), 0
    while offset < body.num_images:
        count = min(most, body.num_images - offset)
        seed = (params.seed + offset) & MAX_SEED
        requests.append(GenerationRequest(params=replace(asked, num_images_per_prompt=count, seed=seed), output=output))
        offset += count
    return requests

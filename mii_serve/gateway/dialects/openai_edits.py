"""OpenAI's image edits and variations, `POST /v1/images/edits` and `/variations`: forms with an image.

What is transparent in an edit's mask is repainted; without a mask, what is transparent in the image; where nothing is, the
whole image is the start of a new one (image-to-image). A variation is image-to-image with an empty prompt. Beside the API's own
members there are `strength` and those of image generations, `loras` here as NAME:SCALE separated by commas.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from mii_serve.errors import InvalidRequestError
from mii_serve.gateway.dialects.openai import IMAGES_PARAMETERS, EditsBody, ImageBody, Images, VariationsBody
from mii_serve.gateway.generation import relocate
from mii_serve.gateway.json_body import shown, validated
from mii_serve.gateway.middleware import EventStream, HttpCall
from mii_serve.gateway.multipart import Form, read_form
from mii_serve.types import MAX_IMAGE_BYTES, PARAMETERS, parsed_loras

FILES = ("image", "mask")
MAX_FORM_BYTES = MAX_IMAGE_BYTES + 1024 * 1024
VARIATION_STRENGTH, VARIATION_GUIDANCE = 0.6, 1.0
"""Of a variation that names none: it keeps the image's composition. Guidance towards an empty prompt has no effect but twice
the cost."""

_KINDS: dict[str, type] = {
    "n": int,
    "partial_images": int,
    "stream": bool,
    "output_compression": int,
    "strength": float,
    **{parameter.name: parameter.kind for parameter in PARAMETERS if parameter.name in IMAGES_PARAMETERS},
}
"""Of the members that are no text; a form has nothing but text."""


_Body = TypeVar("_Body", bound=ImageBody)


async def read_edit(request: Request) -> Form:
    return await read_form(request, MAX_FORM_BYTES, FILES)


class Edits:
    """The answer to a request for edits."""

    def __init__(self, images: Images) -> None:
        self._images = images

    async def __call__(self, call: HttpCall) -> Response | EventStream:
        from mii_serve.safety.input_image import edit_files  # Pillow is for those who send images

        form: Form = call.body
        body = _body(form, EditsBody)
        try:
            image, mask = await asyncio.to_thread(edit_files, form.files["image"], form.files.get("mask"))
        except InvalidRequestError as error:
            relocate(error, {"mask_image": "mask"})
            raise
        return await self._images.answer(call, body, image=image, mask_image=mask, strength=body.strength)


class Variations:
    """The answer to a request for variations."""

    def __init__(self, images: Images) -> None:
        self._images = images

    async def __call__(self, call: HttpCall) -> Response | EventStream:
        form: Form = call.body
        for name in ("prompt", "mask"):
            if name in form.fields or name in form.files:
                raise InvalidRequestError(name, "is not for variations; edits have one")
        body = _body(form, VariationsBody)
        if "guidance_scale" not in body.given():
            body = body.model_copy(update={"guidance_scale": VARIATION_GUIDANCE})
        strength = VARIATION_STRENGTH if body.strength is None else body.strength
        return await self._images.answer(call, body, image=form.files["image"], strength=strength)


def _body(form: Form, model: type[_Body]) -> _Body:
    """The fields of a form that has an image."""
    body = validated(model, {name: _value(name, text) for name, text in form.fields.items()})
    if body.stream:
        raise InvalidRequestError("stream", "is not supported for requests with an image", "true")
    if "image" not in form.files:
        raise InvalidRequestError("image", "is missing")
    return body


def _value(name: str, text: str) -> Any:
    if name == "loras" and text:
        return parsed_loras(text)
    kind = _KINDS.get(name, str)
    if kind is str or text == "":
        return text
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        rules = {int: "must be a whole number", float: "must be a number", bool: "must be true or false"}
        raise InvalidRequestError(name, rules[kind], shown(text)) from None

"""OpenAI's image edits, `POST /v1/images/edits`: a form with an image, perhaps a mask, and the members of image generations.

What is transparent in the mask is repainted; without a mask, what is transparent in the image; where nothing is, the whole
image is the start of a new one (image-to-image). Beside the API's own members there are `strength` and
`loras`, here as NAME:SCALE separated by commas.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mii_serve.errors import InvalidRequestError
from mii_serve.gateway.dialects.openai import IMAGES_PARAMETERS, EditsBody, Images
from mii_serve.gateway.generation import relocate
from mii_serve.gateway.json_body import shown, validated
from mii_serve.gateway.middleware import EventStream, HttpCall
from mii_serve.gateway.multipart import Form, read_form
from mii_serve.types import MAX_IMAGE_BYTES, PARAMETERS, parsed_loras

FILES = ("image", "mask")
MAX_FORM_BYTES = MAX_IMAGE_BYTES + 1024 * 1024

_KINDS: dict[str, type] = {
    "n": int,
    "partial_images": int,
    "stream": bool,
    "output_compression": int,
    "strength": float,
    **{parameter.name: parameter.kind for parameter in PARAMETERS if parameter.name in IMAGES_PARAMETERS},
}
"""Of the members that are no text; a form has nothing but text."""


async def read_edit(request: Request) -> Form:
    return await read_form(request, MAX_FORM_BYTES, FILES)


class Edits:
    """The answer to a request for edits."""

    def __init__(self, images: Images) -> None:
        self._images = images

    async def __call__(self, call: HttpCall) -> Response | EventStream:
        from mii_serve.safety.input_image import edit_files  # Pillow is for those who send images

        form: Form = call.body
        body = validated(EditsBody, {name: _value(name, text) for name, text in form.fields.items()})
        if body.stream:
            raise InvalidRequestError("stream", "is not supported for edits", "true")
        if "image" not in form.files:
            raise InvalidRequestError("image", "is missing")
        try:
            image, mask = await asyncio.to_thread(edit_files, form.files["image"], form.files.get("mask"))
        except InvalidRequestError as error:
            relocate(error, {"mask_image": "mask"})
            raise
        return await self._images.answer(call, body, image=image, mask_image=mask, strength=body.strength)


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

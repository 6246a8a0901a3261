"""The images of `img2img`, made ready as that API says: resized, on white, and the mask inverted and blurred.

All of it takes time: it is for a thread, not for an event loop.
"""

from __future__ import annotations

import base64
import io

from PIL import Image, ImageFilter, ImageOps

from mii_serve.errors import InvalidRequestError
from mii_serve.gateway.dialects.sdapi.body import ImageBody
from mii_serve.safety.input_image import as_seen
from mii_serve.types import MAX_IMAGE_BYTES

IMAGE, MASK = "init_images[0]", "mask"
WHITE = (255, 255, 255)
CROP_AND_RESIZE = 1
FILL = 0
FILL_LAYERS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))
"""What is below a mask begins as the colours around it: blurred with these radii and laid over each other so many times."""
MAX_TEXT_CHARS = MAX_IMAGE_BYTES * 4 // 3 + 100


def input_images(body: ImageBody, width: int, height: int) -> tuple[bytes, bytes | None]:
    """The files of the image and the mask for a request of this size.

    Raises:
        InvalidRequestError: naming the member and the rule.
    """
    given = as_seen(decoded(body.init_images[0], IMAGE), IMAGE)
    image = _resized(_on_white(given), width, height, body.resize_mode)
    if body.mask is None:
        return _png(image), None
    mask = _mask(body, as_seen(decoded(body.mask, MASK), MASK))
    mask = _resized(mask, width, height, body.resize_mode)
    if body.inpainting_fill == FILL:
        image = _filled(image, mask)
    return _png(image), _png(mask)


def decoded(text: str, field: str) -> bytes:
    """The file that base64 text is, with or without the beginning of a data URL.

    Raises:
        InvalidRequestError: it is too long, or no base64.
    """
    if text.startswith(("http://", "https://")):
        raise InvalidRequestError(field, "must be the image itself in base64: addresses are not fetched")
    if len(text) > MAX_TEXT_CHARS:
        raise InvalidRequestError(field, f"must be a file of at most {MAX_IMAGE_BYTES} bytes")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise InvalidRequestError(field, "must be base64") from None
    if not content:
        raise InvalidRequestError(field, "must not be empty")
    return content


def _on_white(image: Image.Image) -> Image.Image:
    if "A" not in image.mode:
        return image.convert("RGB")
    white = Image.new("RGB", image.size, WHITE)
    white.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return white


def _mask(body: ImageBody, given: Image.Image) -> Image.Image:
    """White where the picture is repainted: by transparency where there is some, else by brightness."""
    if "A" in given.mode and given.getchannel("A").getextrema() != (255, 255):
        mask = given.getchannel("A").point(lambda value: 255 if value > 128 else 0)
    else:
        mask = given.convert("L")
    if body.inpainting_mask_invert:
        mask = ImageOps.invert(mask)
    across = body.mask_blur if body.mask_blur_x is None else body.mask_blur_x
    down = body.mask_blur if body.mask_blur_y is None else body.mask_blur_y
    return mask.filter(ImageFilter.GaussianBlur((across, down))) if across or down else mask


def _resized(image: Image.Image, width: int, height: int, mode: int) -> Image.Image:
    if mode == CROP_AND_RESIZE:
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    kept = Image.new("RGBa", image.size)  # with premultiplied alpha, so that what is blurred is the colours that are there
    kept.paste(image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    filled = Image.new("RGBA", image.size)
    for radius, times in FILL_LAYERS:
        layer = kept.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            filled.alpha_composite(layer)
    return filled.convert("RGB")


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()

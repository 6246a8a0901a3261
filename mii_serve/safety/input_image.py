"""The images that callers send, read without trusting them.

Pillow decodes them, at most `MAX_PIXELS` and in three formats only. What an image-to-image pipeline would read in another way
than its sender sees it (transparency, rotation by EXIF, 16 bits, CMYK, animations) is refused, by the name of the field.
All of it takes time: it is for a thread, not for an event loop.
"""

from __future__ import annotations

import io
from dataclasses import replace

from PIL import Image, ImageOps

from mii_serve.errors import InvalidRequestError
from mii_serve.types import (
    LATENT_SCALE,
    MAX_IMAGE_BYTES,
    Capabilities,
    GenerationParams,
    InputImage,
    Limits,
    RequestedParams,
)

MAX_PIXELS = 4096 * 4096
"""Of a file, however small it is; a photo of 12 megapixels fits, and takes less than 70 MiB."""

FORMATS = ("PNG", "JPEG", "WEBP")

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_EXIF_ORIENTATION = 0x0112
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_BIT_DEPTH = 24
"""Where a PNG file has it; of 16-bit colours Pillow drops the lower half without a word."""


def resolve_with_image(
    capabilities: Capabilities, asked: RequestedParams, *, fallback_seed: int
) -> tuple[GenerationParams, InputImage]:
    """What a request with an image means. Where it leaves height or width out, they are the image's, rounded down to
    multiples of 8; where the image has another size, it is resized, as diffusers' pipelines do both.

    Raises:
        InvalidRequestError: naming the field and the rule.
    """
    assert asked.image is not None
    with opened(asked.image, "image") as file:
        size = _size_of(asked, file, capabilities.limits)
        params = capabilities.resolve(replace(asked, height=size[0], width=size[1]), fallback_seed=fallback_seed)
        image = _resized(rgb_of(file, "image"), params)
        mask = None if asked.mask_image is None else _mask_of(asked.mask_image, len(asked.image), file, params)
    return params, InputImage(rgb=image.tobytes(), mask=mask)


def edit_files(image: bytes, mask: bytes | None) -> tuple[bytes, bytes | None]:
    """The image and the mask of OpenAI's edits as those of a request.

    There, what is transparent is to be repainted: in the mask or, without one, in the image itself.

    Raises:
        InvalidRequestError: naming the field and the rule.
    """
    alpha = None
    if mask is not None:
        with opened(mask, "mask_image") as file:
            if (alpha := _alpha_of(_loaded(file, "mask_image"))) is None:
                raise InvalidRequestError("mask_image", "must have an alpha channel: what is transparent is repainted")
    with opened(image, "image") as file:
        own = _alpha_of(_loaded(file, "image"))
        if own is not None:
            image = _png(file.convert("RGBA").convert("RGB"))
            if alpha is None and own.getextrema() != (255, 255):
                alpha = own
    return image, None if alpha is None else _png(ImageOps.invert(alpha))


def opened(content: bytes, field: str) -> Image.Image:
    """A file whose pixels are not decoded yet.

    Raises:
        InvalidRequestError: it is too large, or no still image of a known format with 8 bits a channel.
    """
    if len(content) > MAX_IMAGE_BYTES:
        raise InvalidRequestError(field, f"must be a file of at most {MAX_IMAGE_BYTES} bytes", str(len(content)))
    try:
        file = Image.open(io.BytesIO(content), formats=FORMATS)
        is_animated = file.format != "MPO" and getattr(file, "n_frames", 1) > 1
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(field) from None
    except Exception as error:
        raise _unreadable(field) from error
    if file.width * file.height > MAX_PIXELS:
        raise _too_many_pixels(field, f"{file.width} × {file.height}")
    if is_animated:
        raise InvalidRequestError(field, "must be a still image, not an animation")
    has_16_bits = content.startswith(_PNG_SIGNATURE) and content[_PNG_BIT_DEPTH] == 16
    if has_16_bits or file.mode.startswith(("I", "F")):
        raise InvalidRequestError(field, "must have 8 bits a channel", "16 or more")
    return file


def rgb_of(file: Image.Image, field: str) -> Image.Image:
    """The pixels of an `opened` file.

    Raises:
        InvalidRequestError: it is truncated or broken, rotated by EXIF, transparent, or not in RGB or grey.
    """
    alpha = _alpha_of(_loaded(file, field))
    if alpha is not None and alpha.getextrema() != (255, 255):
        raise InvalidRequestError(field, "must not be transparent anywhere; put it on a background")
    return file.convert("RGB")


def as_seen(content: bytes, field: str) -> Image.Image:
    """The pixels of a file as viewers show them, in L, RGB or RGBA: turned as EXIF says, and transparent where they are.

    Raises:
        InvalidRequestError: as `opened`; or it is truncated or broken, or not in RGB or grey.
    """
    with opened(content, field) as file:
        if file.mode not in _MODES:
            raise InvalidRequestError(field, "must be in RGB or grey", file.mode)
        try:
            turned = ImageOps.exif_transpose(file)
        except Exception as error:
            raise _unreadable(field) from error
        if "A" in turned.mode or "transparency" in turned.info:
            return turned.convert("RGBA")
        return turned.convert("L" if turned.mode in ("1", "L") else "RGB")


def _loaded(file: Image.Image, field: str) -> Image.Image:
    if file.mode not in _MODES:
        raise InvalidRequestError(field, "must be in RGB or grey", file.mode)
    try:
        file.load()
        orientation = file.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception as error:
        raise _unreadable(field) from error
    if orientation not in (0, 1):
        rule = "must not be rotated by its EXIF orientation; rotate its pixels, for example with PIL.ImageOps.exif_transpose"
        raise InvalidRequestError(field, rule, str(orientation)[:80])
    return file


def _alpha_of(image: Image.Image) -> Image.Image | None:
    """None where it has no transparency at all."""
    if "A" not in image.mode and "transparency" not in image.info:
        return None
    return image.convert("RGBA").getchannel("A")


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _mask_of(content: bytes, num_image_bytes: int, image: Image.Image, params: GenerationParams) -> bytes:
    field = "mask_image"
    if (num_bytes := len(content) + num_image_bytes) > MAX_IMAGE_BYTES:
        raise InvalidRequestError(field, f"must have at most {MAX_IMAGE_BYTES} bytes together with the image", str(num_bytes))
    with opened(content, field) as mask:
        if mask.size != image.size:
            rule = f"must have the image's size, {image.width} × {image.height} pixels"
            raise InvalidRequestError(field, rule, f"{mask.width} × {mask.height}")
        rgb_of(mask, field)  # refuses what must be refused
        return _resized(mask, params).convert("L").tobytes()


def _size_of(asked: RequestedParams, file: Image.Image, limits: Limits) -> tuple[int, int]:
    """The height and the width of the result."""
    sides = []
    for wanted, own in ((asked.height, file.height), (asked.width, file.width)):
        side = own - own % LATENT_SCALE if wanted is None else wanted
        if wanted is None and not limits.min_size_px <= side <= limits.max_size_px:
            within = f"[{limits.min_size_px}, {limits.max_size_px}]"
            rule = f"must have a height and a width in {within} pixels, unless the request says which height and width it wants"
            raise InvalidRequestError("image", rule, f"{file.width} × {file.height}")
        sides.append(side)
    return sides[0], sides[1]


def _resized(image: Image.Image, params: GenerationParams) -> Image.Image:
    return image.resize((params.width, params.height), Image.Resampling.LANCZOS)


def _too_many_pixels(field: str, got: str | None = None) -> InvalidRequestError:
    return InvalidRequestError(field, f"must have at most {MAX_PIXELS} pixels", got)


def _unreadable(field: str) -> InvalidRequestError:
    return InvalidRequestError(field, "must be a whole, readable PNG, JPEG or WebP file")

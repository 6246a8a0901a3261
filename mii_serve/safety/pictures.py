"""Pictures for content safety: as files that the service takes, and black where they are blocked."""

from __future__ import annotations

import io

from PIL import Image

from mii_serve.errors import ModerationFailedError
from mii_serve.provenance import Origin, Provenance
from mii_serve.types import ImageFormat

MIN_SIDE_PX, MAX_SIDE_PX = 50, 2048
MAX_FILE_BYTES = 4_000_000
"""Azure AI Content Safety's limits: 50 x 50 to 2048 x 2048 pixels, 4 MB."""
QUALITIES = (95, 80, 60, 40)


def is_scannable(encoded: bytes, image_format: ImageFormat, width: int, height: int) -> bool:
    """Whether the service takes the file as it is."""
    fits = min(width, height) >= MIN_SIDE_PX and max(width, height) <= MAX_SIDE_PX
    return fits and image_format is not ImageFormat.RAW_RGB and len(encoded) <= MAX_FILE_BYTES


def scannable(encoded: bytes, image_format: ImageFormat, width: int, height: int) -> bytes:
    """The same picture as a file that the service takes, its sides scaled alike and the rest left black.

    Raises:
        ModerationFailedError: it cannot be read, or not be made small enough.
    """
    try:
        if image_format is ImageFormat.RAW_RGB:
            image = Image.frombytes("RGB", (width, height), encoded)
        else:
            with Image.open(io.BytesIO(encoded), formats=[image_format.name]) as file:
                image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise ModerationFailedError("a picture that content safety must check cannot be read") from error
    image = _fitted(image)
    for quality in QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, "jpeg", quality=quality)
        if buffer.tell() <= MAX_FILE_BYTES:
            return buffer.getvalue()
    raise ModerationFailedError("a picture is too large for content safety")


def _fitted(image: Image.Image) -> Image.Image:
    scale = min(max(1.0, MIN_SIDE_PX / min(image.size)), MAX_SIDE_PX / max(image.size))
    if scale != 1.0:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if min(image.size) >= MIN_SIDE_PX:
        return image
    padded = Image.new("RGB", (max(image.width, MIN_SIDE_PX), max(image.height, MIN_SIDE_PX)))
    padded.paste(image)
    return padded


def black_picture(image_format: ImageFormat, width: int, height: int, provenance: Provenance, origin: Origin) -> bytes:
    """An entirely black picture as the bytes of a file, marked like the one in whose place it is.

    Raises:
        ProvenanceError: it could not be signed.
    """
    return provenance.write(Image.new("RGB", (width, height)), image_format, origin, is_lossless=True)

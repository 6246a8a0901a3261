"""Files of images as callers send them, and those that are refused wherever they come from."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

from mii_serve.safety.input_image import MAX_PIXELS
from mii_serve.types import MAX_IMAGE_BYTES


def file_of(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def some(mode: str = "RGB", size: tuple[int, int] = (96, 80)) -> Image.Image:
    return Image.effect_noise(size, 60).convert(mode)


def png(width: int, height: int, *, depth: int = 8, data: bytes = b"") -> bytes:
    """A PNG file in RGB with this header, whatever its data are."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(data)),
        (b"IEND", b""),
    ]
    body = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


TRANSPARENT = some().convert("RGBA")
TRANSPARENT.putpixel((3, 3), (0, 0, 0, 254))
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
GOOD = file_of(some(), "JPEG")
REFUSED = {
    "no image": (b"hello", "whole, readable PNG, JPEG or WebP"),
    "nothing": (b"", "whole, readable"),
    "another format": (file_of(some(), "BMP"), "whole, readable"),
    "truncated": (GOOD[: len(GOOD) // 2], "whole, readable"),
    "truncated PNG": (file_of(some())[:200], "whole, readable"),
    "too large a file": (b"\x89PNG\r\n\x1a\n" + bytes(MAX_IMAGE_BYTES), f"at most {MAX_IMAGE_BYTES} bytes, got"),
    "a bomb": (png(60_000, 60_000), f"at most {MAX_PIXELS} pixels"),
    "a smaller bomb": (png(4097, 4096), f"at most {MAX_PIXELS} pixels, got 4097 × 4096"),
    "16 bits": (png(96, 80, depth=16, data=bytes(80 * (1 + 96 * 6))), "8 bits a channel"),
    "16 bits of grey": (file_of(Image.new("I;16", (96, 80))), "8 bits a channel"),
    "transparent": (file_of(TRANSPARENT), "transparent"),
    "a transparent colour": (file_of(Image.new("P", (96, 80)), transparency=0), "transparent"),
    "rotated": (file_of(some(), "JPEG", exif=ROTATED), r"EXIF orientation; rotate .*, got 6"),
    "CMYK": (file_of(some("CMYK"), "JPEG"), "RGB or grey, got CMYK"),
    "moving": (file_of(some(), "WEBP", save_all=True, append_images=[some().rotate(90)]), "still image"),
    "moving PNG": (file_of(some(), save_all=True, append_images=[some().rotate(90)]), "still image"),
    "too small": (file_of(some(size=(63, 96))), r"within|in \[64, 1024\] pixels, unless .*, got 63 × 96"),
    "too wide": (file_of(some(size=(1032, 96))), r"in \[64, 1024\] pixels, unless .*, got 1032 × 96"),
}
"""With what is said of each."""

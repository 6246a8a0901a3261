"""The files of images. Those that a request starts from are read; the results' paths are checked before any work is done, and
each is written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mii_serve.errors import InvalidRequestError
from mii_serve.types import MAX_IMAGE_BYTES, ImageFormat

FORMATS = {
    ".png": ImageFormat.PNG,
    ".jpg": ImageFormat.JPEG,
    ".jpeg": ImageFormat.JPEG,
    ".webp": ImageFormat.WEBP,
}


def check_output(path: Path, name: str = "output") -> ImageFormat:
    """The format that the file's name asks for; `name` is the option's.

    Raises:
        InvalidRequestError: an unknown suffix, or nowhere to write the file.
    """
    image_format = FORMATS.get(path.suffix.lower())
    if image_format is None:
        raise InvalidRequestError(name, f"must end in {', '.join(FORMATS)}", str(path))
    check_place(path, name)
    return image_format


def check_place(path: Path, name: str) -> None:
    """See to it that the file can be written.

    Raises:
        InvalidRequestError: it cannot.
    """
    if not path.parent.is_dir():
        raise InvalidRequestError(name, f"must be in an existing folder, got {path}")
    if path.is_dir():
        raise InvalidRequestError(name, f"must be a file, and {path} is a folder")
    if not os.access(path.parent, os.W_OK):
        raise InvalidRequestError(name, f"must be in a writable folder, got {path}")


def read_image(name: str, path: Path) -> bytes:
    """The content of an image's file, as the option `name` gives it; the server decodes it.

    Raises:
        InvalidRequestError: it cannot be read, or is too large.
    """
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise InvalidRequestError(name, f"must be a file of at most {MAX_IMAGE_BYTES} bytes", str(path.stat().st_size))
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequestError(name, f"must be a file that can be read ({error.strerror})", str(path)) from None


def output_paths(path: Path, num_images: int) -> list[Path]:
    """One image goes to the path itself, several to name-0, name-1, …"""
    if num_images == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(num_images)]


def write_all(paths: Sequence[Path], files: Sequence[bytes]) -> None:
    """Write every file, replacing what was there; a reader never sees half of one."""
    for path, content in zip(paths, files, strict=True):
        half = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            half.write_bytes(content)
            half.replace(path)
        finally:
            half.unlink(missing_ok=True)

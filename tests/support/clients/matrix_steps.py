"""What a client of the matrix does, step by step. Each works or ends with an error, and all are printed as one JSON object.

Scripts of the matrix import this; it needs nothing but the standard library, and they run in environments of their own.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import struct
import sys
import urllib.request
import zlib
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

SIZE = "64x96"
"""Width and height of every image."""
FEW = {"num_inference_steps": 3, "seed": 5, "negative_prompt": "blurry"}
"""Parameters that OpenAI's API does not have."""


class Steps:
    """`package` is the distribution whose version is reported."""

    def __init__(self, package: str) -> None:
        self._seen: dict[str, Any] = {"version": version(package), "steps": {}}

    def run(self, what: str, call: Callable[[], Any]) -> Any:
        """Do one step; its value, which is not printed, or None where it failed."""
        try:
            value = call()
            if inspect.isawaitable(value):
                value = asyncio.run(_awaited(value))
        except Exception as error:  # noqa: BLE001 - whatever a client raises is what its users see
            self._seen["steps"][what] = f"{type(error).__name__}: {error}"[:400]
            return None
        self._seen["steps"][what] = None
        return value

    def refused(self, what: str, said: str, call: Callable[[], Any]) -> None:
        """A step that works if the client raises an error that says so."""

        def caught() -> None:
            try:
                value = call()
                if inspect.isawaitable(value):
                    asyncio.run(_awaited(value))
            except Exception as error:
                if said in str(error):
                    return
                raise
            raise AssertionError("it was not refused")

        self.run(what, caught)

    def same(self, what: str, call: Callable[[], Any]) -> None:
        """A step that works if the seed has an effect: what is made twice is the same."""

        def twice() -> None:
            assert call() == call(), "two different images with the same seed"

        self.run(what, twice)

    def print(self) -> None:
        json.dump(self._seen, sys.stdout)


async def _awaited(value: Any) -> Any:
    return await value


def check_png(file: bytes, size: str = SIZE) -> bytes:
    """The file, if it is a PNG of this size."""
    assert file[:8] == b"\x89PNG\r\n\x1a\n", file[:8]
    width, height = struct.unpack(">II", file[16:24])
    assert f"{width}x{height}" == size, (width, height)
    return file


def check_base64(text: str) -> bytes:
    return check_png(base64.b64decode(text))


def check_link(url: str) -> bytes:
    """The image at an address of our own server, fetched without a key."""
    assert url.startswith("http://127.0.0.1:"), url
    with urllib.request.urlopen(url) as answer:
        return check_png(answer.read())


def a_png() -> bytes:
    """An image of that size, to start from."""
    width, height = map(int, SIZE.split("x"))
    rows = b"".join(b"\0" + b"".join(bytes((x * 4 % 256, y * 2 % 256, 90)) for x in range(width)) for y in range(height))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")

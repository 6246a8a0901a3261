"""The pictures of a verification on one sheet: the reference's, the engine's, and their amplified difference."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

from mii_serve.types import ImageFormat, Picture

TILE_PX = 192
"""Smaller pictures are enlarged, pixel by pixel, towards this width."""
CAPTION_PX, GAP_PX = 16, 8
INK, PAPER = (20, 20, 20), (255, 255, 255)


def sheet(pictures: Mapping[str, tuple[Picture, Picture]], image_format: ImageFormat) -> bytes:
    """A row for each pair, the reference's picture first; every difference is enlarged by the same number, which is written."""
    pairs = {name: (_array(expected), _array(output)) for name, (expected, output) in pictures.items()}
    largest = max((int(_difference(expected, output).max()) for expected, output in pairs.values()), default=0)
    factor = 255 // max(1, largest)
    tiles = {
        name: [_enlarged(one) for one in (expected, output, _difference(expected, output) * factor)]
        for name, (expected, output) in pairs.items()
    }
    width = GAP_PX + sum(max((row[column].width for row in tiles.values()), default=0) + GAP_PX for column in range(3))
    height = CAPTION_PX + 2 * GAP_PX + sum(row[0].height + CAPTION_PX + GAP_PX for row in tiles.values())
    page = Image.new("RGB", (max(width, 3 * TILE_PX), height), PAPER)
    pen, top = ImageDraw.Draw(page), GAP_PX
    pen.text((GAP_PX, top), f"reference | engine, in a batch | difference x {factor}", INK)
    top += CAPTION_PX + GAP_PX
    for name, row in tiles.items():
        pen.text((GAP_PX, top), f"{name}: at most {int(_difference(*pairs[name]).max())} of 255", INK)
        left = GAP_PX
        for tile in row:
            page.paste(tile, (left, top + CAPTION_PX))
            left += tile.width + GAP_PX
        top += row[0].height + CAPTION_PX + GAP_PX
    file = io.BytesIO()
    page.save(file, format=image_format.name)
    return file.getvalue()


def _array(picture: Picture) -> np.ndarray:
    return np.frombuffer(picture.rgb, np.uint8).reshape(picture.height, picture.width, 3).astype(np.int64)


def _difference(expected: np.ndarray, output: np.ndarray) -> np.ndarray:
    return np.abs(expected - output)


def _enlarged(pixels: np.ndarray) -> Image.Image:
    picture = Image.fromarray(pixels.astype(np.uint8))
    factor = max(1, TILE_PX // picture.width)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)

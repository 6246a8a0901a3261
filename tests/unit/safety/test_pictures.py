"""What content safety is shown: within the service's limits, whatever was made."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mii_serve.errors import ModerationFailedError
from mii_serve.provenance import Origin, Provenance
from mii_serve.provenance.report import report_on
from mii_serve.safety.pictures import MAX_FILE_BYTES, black_picture, is_scannable, scannable
from mii_serve.types import ImageFormat


def noise(width: int, height: int) -> bytes:
    return np.random.default_rng(0).integers(0, 256, width * height * 3, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("size", [(8, 8), (8, 2048), (49, 50), (50, 2048), (4096, 64), (4096, 8), (3000, 3000)], ids=str)
def test_every_picture_fits(size):
    seen = scannable(noise(*size), ImageFormat.RAW_RGB, *size)
    with Image.open(io.BytesIO(seen)) as image:
        assert all(50 <= side <= 2048 for side in image.size)
        scale = min(a / b for a, b in zip(image.size, size, strict=True))
        assert image.convert("L").getextrema()[1] > 100
    assert len(seen) <= MAX_FILE_BYTES
    assert scale > 0.4, "nothing is cut away"


@pytest.mark.parametrize("image_format", [ImageFormat.PNG, ImageFormat.JPEG, ImageFormat.WEBP])
def test_a_file_that_fits_goes_as_it_is_and_another_does_not(image_format):
    assert is_scannable(b"x" * MAX_FILE_BYTES, image_format, 50, 2048)
    assert not is_scannable(b"x" * (MAX_FILE_BYTES + 1), image_format, 512, 512)
    assert not is_scannable(b"x", image_format, 49, 512)
    assert not is_scannable(b"x", image_format, 512, 2049)
    assert not is_scannable(b"x", ImageFormat.RAW_RGB, 512, 512)


def test_a_heavy_png_is_made_lighter_and_stays_whole():
    buffer = io.BytesIO()
    Image.frombytes("RGB", (1500, 1500), noise(1500, 1500)).save(buffer, "png", compress_level=0)
    assert len(buffer.getvalue()) > MAX_FILE_BYTES
    seen = scannable(buffer.getvalue(), ImageFormat.PNG, 1500, 1500)
    with Image.open(io.BytesIO(seen)) as image:
        assert image.size == (1500, 1500)


@pytest.mark.parametrize(("encoded", "image_format"), [(b"no picture", ImageFormat.PNG), (b"short", ImageFormat.RAW_RGB)])
def test_what_cannot_be_shown_has_no_verdict(encoded, image_format):
    with pytest.raises(ModerationFailedError):
        scannable(encoded, image_format, 64, 64)


@pytest.mark.parametrize("image_format", list(ImageFormat))
def test_black_is_black(image_format):
    encoded = black_picture(image_format, 72, 8, Provenance(), Origin(model="m", model_revision="r"))
    if image_format is ImageFormat.RAW_RGB:
        assert encoded == bytes(72 * 8 * 3)
        return
    with Image.open(io.BytesIO(encoded)) as image:
        assert (image.format, image.size, image.mode) == (image_format.name, (72, 8), "RGB")
        assert image.getextrema() == ((0, 0),) * 3
    assert report_on(encoded, "black").is_marked

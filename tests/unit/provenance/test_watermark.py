"""The watermark of Stable Diffusion's script: found where it is, not found where it is not, and hardly seen."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mii_serve.provenance import Origin, Provenance, watermark
from mii_serve.provenance.report import report_on
from mii_serve.types import ImageFormat

WIDTH, HEIGHT = 520, 504


def picture() -> Image.Image:
    """Smooth shapes with some noise."""
    chance = np.random.default_rng(3)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float64)
    channels = [127 + 100 * np.sin(x / 37 + phase) * np.cos(y / 53 - phase) for phase in (0.0, 1.1, 2.3)]
    noisy = np.stack(channels, axis=-1) + chance.normal(0, 4, (HEIGHT, WIDTH, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8), "RGB")


def marked(image: Image.Image) -> Image.Image:
    return Image.frombytes("RGB", image.size, watermark.embed(image.tobytes(), *image.size))


def test_it_is_read_from_the_pixels_it_was_put_into():
    image = picture()
    before, after = watermark.read(image), watermark.read(marked(image))
    assert not before.is_found and after.is_found
    assert after.num_bits == before.num_bits == 8 * len("StableDiffusionV1")


@pytest.mark.parametrize(("image_format", "has_it"), [(ImageFormat.PNG, True), (ImageFormat.JPEG, False)])
def test_a_file_gets_it_where_its_format_keeps_it(image_format, has_it):
    image, origin = picture(), Origin(model="m", model_revision="r")
    provenance = Provenance(has_watermark=True)
    pixels = provenance.marked_pixels(image.tobytes(), *image.size, image_format)
    file = provenance.write(Image.frombytes("RGB", image.size, pixels), image_format, origin)
    assert report_on(file, "file").watermark.is_found is has_it
    assert ("watermark" in provenance.marks(image_format, *image.size)) is has_it
    assert (pixels != image.tobytes()) is has_it


def test_it_changes_little_and_not_at_all_what_is_too_small():
    image = picture()
    before, after = (np.asarray(one).astype(np.int16) for one in (image, marked(image)))
    assert 0 < np.abs(after - before).mean() < 1
    assert not (after - before)[..., 0].any(), "red has no part in U's change"
    small = image.crop((0, 0, 255, 255))
    assert marked(small).tobytes() == small.tobytes() and watermark.read(small) is None


def test_a_block_holds_its_bit_as_the_package_places_it():
    """The rule by hand, on grey pixels: U is 128 everywhere, so each coefficient is 256, and the second of a block is moved."""
    rgb = watermark.embed(bytes([100]) * (256 * 256 * 3), 256, 256)
    first = np.frombuffer(rgb, np.uint8).reshape(256, 256, 3)[:8, :8]
    # "S" is 01010011, so the first block holds a 0: 256 goes to 7 * 36 + 9 = 261, and U of four pixels from 128 to 130.5.
    assert first[:2, 2:4].tolist() == [[[100, 99, 105]] * 2] * 2
    assert (np.delete(first.reshape(64, 3), [2, 3, 10, 11], axis=0) == 100).all()

"""The invisible watermark of Stable Diffusion's own script: its text, in the pixels, so that detectors for it find it here.

The method is `dwtDct` of the package invisible-watermark (MIT licence). Its rule is stated here and computed with numpy alone,
because that package needs OpenCV and torch in every process that encodes a picture:

- The U channel (BT.601) goes through one level of the Haar wavelet. Of its low band, each block of 4 × 4 coefficients, row by
  row, holds one bit of the text; the bits repeat until the blocks end.
- In a block, the coefficient with the largest magnitude, the first one left out, is moved within its interval of `SCALE`: to a
  quarter of the interval for a 0, to three quarters for a 1. Its sign stays.
- A bit is read from each block by the same rule, and the blocks of one bit vote.

`benchmarks/provenance.py` measures what it costs, whether the package itself reads it, and what lossy files leave of it:
next to nothing, so that only PNG and raw pixels get it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    Pixels: TypeAlias = NDArray[np.uint8]
    Floats: TypeAlias = NDArray[np.float32]

TEXT = "StableDiffusionV1"
MIN_PIXELS = 256 * 256
"""In smaller pictures each bit has too few blocks; the package refuses them, too."""
SCALE = 36.0
BLOCK = 4
MIN_MATCHING = 0.75
"""Of the bits of the text, for it to count as found. Chance gives half of them, 0.04 more or less."""

_U_OF_RGB = (-0.147, -0.289, 0.436)
_GREEN_OF_U, _BLUE_OF_U = -0.395, 2.032


@dataclass(frozen=True, slots=True, kw_only=True)
class WatermarkReading:
    """How many bits of the text a picture has where the watermark has them."""

    num_matching: int
    num_bits: int

    @property
    def is_found(self) -> bool:
        return self.num_matching >= MIN_MATCHING * self.num_bits


def can_carry(width: int, height: int) -> bool:
    return width * height >= MIN_PIXELS


def embed(rgb: bytes, width: int, height: int) -> bytes:
    """The pixels with the watermark; as they are where there are too few of them."""
    import numpy as np

    if not can_carry(width, height):
        return rgb
    pixels: Pixels = np.frombuffer(rgb, np.uint8).reshape(height, width, 3)
    blocks, largest, values = _largest_of_blocks(pixels)
    bits = np.resize(_bits(), len(values)).astype(np.float32)
    moved = np.copysign((np.abs(values) // SCALE + 0.25 + 0.5 * bits) * SCALE, values)
    changes = np.zeros((len(values), BLOCK * BLOCK), np.float32)
    changes[np.arange(len(values)), largest] = moved - values
    rows, columns = blocks
    low = changes.reshape(rows, columns, BLOCK, BLOCK).swapaxes(1, 2).reshape(rows * BLOCK, columns * BLOCK)
    # The inverse wavelet gives half of a low coefficient's change to each of its four pixels.
    u = np.repeat(np.repeat(low / 2, 2, axis=0), 2, axis=1)
    marked = pixels.astype(np.float32)
    part = marked[: u.shape[0], : u.shape[1]]
    part[..., 1] += _GREEN_OF_U * u
    part[..., 2] += _BLUE_OF_U * u
    result: bytes = np.clip(np.rint(marked), 0, 255).astype(np.uint8).tobytes()
    return result


def read(image: Image.Image) -> WatermarkReading | None:
    """How much of the watermark the picture has; None where it is too small to have one."""
    import numpy as np

    if not can_carry(*image.size):
        return None
    _, _, values = _largest_of_blocks(np.asarray(image.convert("RGB")))
    votes = np.abs(values) % SCALE > SCALE / 2
    bits = _bits()
    indexes = np.arange(len(votes)) % len(bits)
    share = np.bincount(indexes, votes, len(bits)) / np.bincount(indexes, minlength=len(bits))
    return WatermarkReading(num_matching=int(np.sum((share > 0.5) == bits)), num_bits=len(bits))


def _bits() -> NDArray[np.bool_]:
    import numpy as np

    return np.unpackbits(np.frombuffer(TEXT.encode(), np.uint8)).astype(np.bool_)


def _largest_of_blocks(pixels: Pixels) -> tuple[tuple[int, int], NDArray[np.intp], Floats]:
    """The rows and columns of blocks; of each block, where its coefficient is and its value."""
    import numpy as np

    side = 2 * BLOCK
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    used = pixels[: rows * side, : columns * side].astype(np.float32)
    u = np.clip(np.rint(used @ np.array(_U_OF_RGB, np.float32) + 128), 0, 255)
    low = u.reshape(rows * BLOCK, 2, columns * BLOCK, 2).sum(axis=(1, 3)) / 2
    blocks = low.reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2).reshape(rows * columns, BLOCK * BLOCK)
    largest = np.argmax(np.abs(blocks[:, 1:]), axis=1) + 1
    return (rows, columns), largest, blocks[np.arange(len(blocks)), largest]

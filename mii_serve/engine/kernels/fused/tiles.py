"""The tiles of the Triton kernels, all of them: what runs, what the tests compile, and what they run in the interpreter.

A tile is chosen by shape alone. The limits are those of registers: what is here compiles for compute capabilities 8.0 and 9.0
without a spill (`tests/contract/test_kernels_compile.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_WHOLE = 16_384
"""Numbers of a group that one program of `group_norm_whole` holds in registers, padded; twice as many spill."""

MAX_CHUNKS = 256
"""Chunks of a row that `group_scales` reads at once."""


@dataclass(frozen=True, slots=True)
class Tile:
    """The sizes of a block as its kernel names them, and how it is compiled."""

    sizes: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int = 1

    def __getitem__(self, name: str) -> int:
        return dict(self.sizes)[name]


def _tile(num_warps: int, num_stages: int = 1, **sizes: int) -> Tile:
    return Tile(tuple(sizes.items()), num_warps, num_stages)


def group_norm_whole(num_pixels: int, channels_per_group: int) -> Tile | None:
    """None where a group is too large for one program."""
    pixels, group = padded(num_pixels), padded(channels_per_group)
    if pixels * group > MAX_WHOLE:
        return None
    warps = max(1, min(16, pixels * group // 1024))
    return _tile(warps, PIXELS=pixels, GROUP_PADDED=group)


def group_sums(num_pixels: int) -> Tile:
    """Chunks of 256 pixels, and of so many more that there are not too many of them."""
    blocks = 4
    while -(-num_pixels // (64 * blocks)) > MAX_CHUNKS:
        blocks *= 2
    return _tile(4, PIXELS=64, CHANNELS=64, BLOCKS=blocks)


def group_scales(num_chunks: int, channels_per_group: int) -> Tile:
    return _tile(4, CHUNKS=padded(num_chunks), GROUP_PADDED=padded(channels_per_group))


GROUP_APPLY = _tile(4, PIXELS=64, CHANNELS=64)
SAMPLER = _tile(4, BLOCK=1024)
UPSAMPLE = _tile(4, PIXELS=32, CHANNELS=64)
GEGLU = _tile(4, TOKENS=4, CHANNELS=256)


def layer_norm(width: int) -> Tile:
    return _tile(4, TOKENS=4 if width <= 1024 else 2, WIDTH_PADDED=padded(width))


def linear_geglu() -> Tile:
    return _tile(8, 3, TOKENS=128, CHANNELS=64, STEP=64, GROUP=8)


def attention(head: int, num_keys: int) -> Tile | None:
    """None for heads that no tile is for."""
    if (parts := HEAD_PARTS.get(head)) is None:
        return None
    sizes = {"HEAD": head, "FIRST": parts[0], "SECOND": parts[1], "NUM_KEYS": num_keys}
    if num_keys < 128:
        return _tile(4, 2, QUERIES=64, KEYS=32, **sizes)
    if head > 80:
        return _tile(8, 2, QUERIES=128, KEYS=64, **sizes)
    return _tile(8, 3, QUERIES=128, KEYS=64, **sizes)


HEAD_PARTS = {40: (32, 16), 80: (64, 16), 160: (128, 32)}
"""Channels of a head in two powers of two, of which a matrix product needs 16 or more."""


def padded(number: int) -> int:
    """The power of two that holds it."""
    return 1 << (number - 1).bit_length()

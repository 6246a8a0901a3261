"""CUDA-graph buckets: the batch shapes that are captured at start-up, see `mii_serve.types.choose_bucket`."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mii_serve.types import BatchShape, choose_bucket

__all__ = ["MAX_PADDING", "BatchShape", "choose_bucket", "declare_buckets"]

MAX_PADDING = Fraction(1, 8)
"""Of the rows of a bucket: the part that padding may be, for any batch of the buckets' latent shape."""


def declare_buckets(max_slots: int, height: int, width: int, *, may_be_guided: bool = True) -> tuple[BatchShape, ...]:
    """Buckets for every batch of up to `max_slots` samples, with padding of at most `MAX_PADDING`; the largest first.

    Two for each number of rows: one for as many samples as have one row each, and one for samples with two, because what a
    sample's two rows have in common is computed for each sample. 26 for 16 slots, 18 for 8. CUDA graphs of one memory pool
    share its memory best when the largest is captured first. Where no sample has two rows, only the first kind.
    """
    levels = tuple(_row_levels(2 * max_slots if may_be_guided else max_slots))
    buckets = {BatchShape(min(rows, max_slots), rows, height, width) for rows in levels}
    for num_guided in range(1, max_slots + 1) if may_be_guided else ():
        rows = next(level for level in levels if level >= 2 * num_guided)
        buckets.add(BatchShape(rows // 2, rows, height, width))
    return tuple(sorted(buckets, key=lambda bucket: (bucket.num_latent_pixels, bucket.num_samples), reverse=True))


def _row_levels(max_rows: int) -> Iterator[int]:
    """The fewest numbers of rows of which every number up to `max_rows` can be padded to one."""
    level = 0
    while level < max_rows:
        level = min(max_rows, int((level + 1) / (1 - MAX_PADDING)))
        yield level

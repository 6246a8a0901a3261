"""CUDA-graph buckets: the batch shapes that are captured at start-up, and the one a batch is padded to. Integers only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

MAX_PADDING = Fraction(1, 8)
"""Of the rows of a bucket: the part that padding may be, for any batch of the buckets' latent shape."""


@dataclass(frozen=True, slots=True, order=True)
class BatchShape:
    """Samples of a batch, rows of its UNet call (one for each sample, one more for each guided sample), latent height and
    width.

    A bucket is a batch shape that was declared beforehand.
    """

    num_samples: int
    num_rows: int
    height: int
    width: int

    @property
    def num_latent_pixels(self) -> int:
        """Rows × latent height × latent width."""
        return self.num_rows * self.height * self.width

    def holds(self, batch: BatchShape, *, has_fixed_rows: bool = False) -> bool:
        """Whether a batch can be padded to this shape.

        With fixed rows, a guided sample's second row is one of those beyond `num_samples`; otherwise it is any row.
        """
        return (
            (self.height, self.width) == (batch.height, batch.width)
            and self.num_samples >= batch.num_samples
            and self.num_rows >= batch.num_rows
            and (not has_fixed_rows or self.num_rows - self.num_samples >= batch.num_rows - batch.num_samples)
        )


def declare_buckets(max_slots: int, height: int, width: int) -> tuple[BatchShape, ...]:
    """Buckets for every batch of up to `max_slots` samples, with padding of at most `MAX_PADDING`; the largest first.

    Two for each number of rows: one for as many samples as have one row each, and one for samples with two, because what a
    sample's two rows have in common is computed for each sample. 26 for 16 slots, 18 for 8. CUDA graphs of one memory pool
    share its memory best when the largest is captured first.
    """
    levels = tuple(_row_levels(2 * max_slots))
    buckets = {BatchShape(min(rows, max_slots), rows, height, width) for rows in levels}
    for num_guided in range(1, max_slots + 1):
        rows = next(level for level in levels if level >= 2 * num_guided)
        buckets.add(BatchShape(rows // 2, rows, height, width))
    return tuple(sorted(buckets, key=lambda bucket: (bucket.num_latent_pixels, bucket.num_samples), reverse=True))


def choose_bucket(buckets: Iterable[BatchShape], batch: BatchShape, *, has_fixed_rows: bool = False) -> BatchShape | None:
    """The smallest bucket that holds the batch; None where no bucket does."""
    fitting = [bucket for bucket in buckets if bucket.holds(batch, has_fixed_rows=has_fixed_rows)]
    return min(fitting, key=lambda bucket: (bucket.num_latent_pixels, bucket.num_samples), default=None)


def _row_levels(max_rows: int) -> Iterator[int]:
    """The fewest numbers of rows of which every number up to `max_rows` can be padded to one."""
    level = 0
    while level < max_rows:
        level = min(max_rows, int((level + 1) / (1 - MAX_PADDING)))
        yield level

"""The shape of a batch, and the declared shape that it is padded to. Integers only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


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


def choose_bucket(buckets: Iterable[BatchShape], batch: BatchShape, *, has_fixed_rows: bool = False) -> BatchShape | None:
    """The smallest bucket that holds the batch; None where no bucket does."""
    fitting = [bucket for bucket in buckets if bucket.holds(batch, has_fixed_rows=has_fixed_rows)]
    return min(fitting, key=lambda bucket: (bucket.num_latent_pixels, bucket.num_samples), default=None)

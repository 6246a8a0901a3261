"""CUDA-graph buckets: the batch shapes that are captured at start-up. Integers only."""

from __future__ import annotations

from mii_serve.types import BatchShape, choose_bucket

__all__ = ["BatchShape", "choose_bucket", "declare_buckets"]


def declare_buckets(max_slots: int, height: int, width: int) -> tuple[BatchShape, ...]:
    """Powers of two samples up to `max_slots`, each with all samples guided and with none; the largest first.

    CUDA graphs of one memory pool share its memory best when the largest is captured first.
    """
    counts = [max_slots]
    counts += [count for count in (2**power for power in range(max_slots.bit_length())) if count < max_slots]
    buckets = {BatchShape(count, rows, height, width) for count in counts for rows in (count, 2 * count)}
    return tuple(sorted(buckets, key=lambda bucket: (bucket.num_latent_pixels, bucket.num_samples), reverse=True))

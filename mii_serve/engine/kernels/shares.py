"""Which rows of a UNet call each rank computes. Integers only; decided by the batch's shape alone, on every rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank computes: its `rows`, the `samples` they belong to, and for each row an index into `samples`."""

    rows: tuple[int, ...]
    samples: tuple[int, ...]
    sample_of_row: tuple[int, ...]


def shares(num_samples: int, num_rows: int, num_ranks: int) -> tuple[Share, ...]:
    """Every row on exactly one rank, and on each rank as many rows as on any other, or one fewer.

    The guided samples come first: sample i has row i, and row `num_samples` + i if that is less than `num_rows`. The two rows
    of a guided sample are on one rank wherever that leaves the shares even; a kernel set may compute what they have in common
    once.
    """
    num_pairs = num_rows - num_samples
    pairs = [(i, num_samples + i) for i in range(num_pairs)]
    room = [num_rows // num_ranks + (rank < num_rows % num_ranks) for rank in range(num_ranks)]
    taken: list[list[int]] = [[] for _ in range(num_ranks)]
    for rank in range(num_ranks):
        while pairs and room[rank] - len(taken[rank]) >= 2:
            taken[rank] += pairs.pop(0)
    left = [row for pair in pairs for row in pair] + list(range(num_pairs, num_samples))
    for rank in range(num_ranks):
        num_free = room[rank] - len(taken[rank])
        taken[rank] += left[:num_free]
        del left[:num_free]
    return tuple(_share(rows, num_samples) for rows in taken)


def _share(rows: list[int], num_samples: int) -> Share:
    ordered = sorted(rows)
    samples = sorted({row % num_samples for row in ordered})
    return Share(tuple(ordered), tuple(samples), tuple(samples.index(row % num_samples) for row in ordered))

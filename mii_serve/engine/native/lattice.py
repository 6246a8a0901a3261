"""The sizes a turn may have: which are declared, and which of them a turn is padded up to. Integers only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class TurnSize:
    """Samples in a turn, rows of its UNet call (one more for each guided sample), latent height and width."""

    num_samples: int
    num_rows: int
    height: int
    width: int

    @property
    def num_cells(self) -> int:
        return self.num_rows * self.height * self.width

    def holds(self, turn: TurnSize) -> bool:
        """Whether a turn can be padded to this size: there is a row for each sample, and one more for each guided one."""
        return (
            (self.height, self.width) == (turn.height, turn.width)
            and self.num_samples >= turn.num_samples
            and self.num_rows - self.num_samples >= turn.num_rows - turn.num_samples
        )


def declare(max_slots: int, height: int, width: int) -> tuple[TurnSize, ...]:
    """Powers of two up to `max_slots`, each with all samples guided and with none; the largest first.

    CUDA graphs of one pool reuse its memory best when the largest is captured first.
    """
    counts = [max_slots]
    counts += [count for count in (2**power for power in range(max_slots.bit_length())) if count < max_slots]
    sizes = {TurnSize(count, rows, height, width) for count in counts for rows in (count, 2 * count)}
    return tuple(sorted(sizes, key=lambda size: (size.num_cells, size.num_samples), reverse=True))


def choose(declared: Iterable[TurnSize], turn: TurnSize) -> TurnSize | None:
    """The declared size that costs the turn least, None when none holds it."""
    fitting = [size for size in declared if size.holds(turn)]
    return min(fitting, key=lambda size: (size.num_cells, size.num_samples), default=None)

"""Which replica makes what: each image where least work is left, and a suspect alone.

A suspect is work that was on a replica when it crashed. It is made again with nothing beside it, so that only the request that
crashes replicas is refused, and no other one is lost with it twice. While suspects wait, replicas are emptied for them, one
at a time for each; where there are several replicas, at least one stays open for everything else.

Pure: values in, values out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

MAX_CRASHES = 2
"""Crashes that a request may see in work, the last of them alone on its replica, before it is refused."""
MAX_CRASHES_ALONE = 3
"""The same where no replica said that it had begun with the request: the damage may be that of another one before it."""
MAX_KILLS_ALONE = 3
"""Kills from outside that a request may see alone: the kernel kills who takes too much memory."""


class Replica(Protocol):
    """What is read of a replica. `is_isolated` while it makes a suspect. Its `work` does not count that of batch requests."""

    work: int
    batch_work: int
    num_running: int
    is_isolated: bool


R = TypeVar("R", bound=Replica)


def reserved(up: Sequence[R], num_suspects_waiting: int) -> list[R]:
    """The replicas that take nothing but suspects: those that make one, then those that are emptied for one.

    The replica with the least to do is emptied, and no other work is added to it, so it is empty in the end.
    """
    isolated = [replica for replica in up if replica.is_isolated]
    others = sorted((r for r in up if not r.is_isolated), key=lambda replica: (replica.num_running, replica.work))
    num_more = min(num_suspects_waiting, max(1, len(up) - 1) - len(isolated))
    return isolated + others[: max(0, num_more)]


def not_reserved(up: Sequence[R], num_suspects_waiting: int) -> list[R]:
    """The replicas that take work of any request."""
    taken = reserved(up, num_suspects_waiting)
    return [replica for replica in up if not any(replica is other for other in taken)]


def empty_for_suspects(up: Sequence[R], num_suspects_waiting: int) -> list[R]:
    """The replicas on which a waiting suspect can begin now."""
    return [r for r in reserved(up, num_suspects_waiting) if not r.is_isolated and not r.num_running]


def load_of(replica: Replica, *, is_batch: bool) -> int:
    """The work that a new request finds there: batch requests give way to all, so only they see their own."""
    return replica.work + replica.batch_work * is_batch


def shares(replicas: Iterable[R], num_images: int, work_per_image: int, *, is_batch: bool = False) -> list[tuple[R, int]]:
    """How many images each replica gets so that none finishes late; those that get none are left out."""
    loads = [_Load(replica, load_of(replica, is_batch=is_batch)) for replica in replicas]
    for _ in range(num_images):
        least = min(loads, key=lambda load: (load.work, load.num_images))
        least.num_images += 1
        least.work += work_per_image
    return [(load.replica, load.num_images) for load in loads if load.num_images]


@dataclass(slots=True)
class _Load(Generic[R]):
    replica: R
    work: int
    num_images: int = 0


@dataclass(slots=True)
class Evidence:
    """What speaks against one part of a request."""

    num_losses: int = 0
    num_crashes: int = 0
    num_crashes_alone: int = 0
    num_kills_alone: int = 0
    is_suspect: bool = False

    def add(self, *, is_crash: bool, was_alone: bool, had_started: bool) -> bool:
        """Note the loss of the replica the part was on; whether the part is to blame.

        A part that had only waited on a crashed replica is a suspect at its second loss: there may be thousands of those. So is
        one that was killed twice from outside.
        """
        self.num_losses += 1
        self.num_crashes += is_crash and (had_started or was_alone)
        self.num_crashes_alone += is_crash and was_alone
        self.num_kills_alone += was_alone and not is_crash
        self.is_suspect |= was_alone or self.num_losses > 1 or (is_crash and had_started)
        return (
            (is_crash and was_alone and had_started and self.num_crashes >= MAX_CRASHES)
            or self.num_crashes_alone >= MAX_CRASHES_ALONE
            or self.num_kills_alone >= MAX_KILLS_ALONE
        )

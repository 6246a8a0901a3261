"""What the ranks of a replica exchange: tensors of a UNet call, and small objects between calls."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed

_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
"""The newer name, where torch has it."""


class RankGroup:
    """This process's place among the ranks of its replica; they are connected with NCCL on GPUs and with gloo on a CPU.

    Every method is called by all ranks, in the same order. A rank that does not come is waited for, for the timeout on a CPU
    and for ever on a GPU, where a captured collective has no timeout; the replica's supervisor ends the whole group.
    `num_collectives` and `num_sent_bytes` count the tensors that were exchanged; the replay of a captured call is not counted.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.num_collectives = 0
        self.num_sent_bytes = 0
        self._is_apart = False

    def connect(self, rendezvous: str, device: torch.device, timeout_s: float) -> None:
        """Meet the other ranks through a file that is empty at first. Returns when all are there.

        Raises:
            RuntimeError: they do not all come within the timeout.
        """
        is_cuda = device.type == "cuda"
        if is_cuda:
            torch.cuda.set_device(device)
        else:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would look up the machine's name, which may not resolve
        distributed.init_process_group(
            "nccl" if is_cuda else "gloo",
            init_method=f"file://{rendezvous}",
            rank=self.rank,
            world_size=self.size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        # NCCL connects in the first collective, which must not be a captured one.
        self.all_gather(torch.zeros(1, device=device))
        self.num_collectives = self.num_sent_bytes = 0

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, which have the same shape, one after the other along the first dimension."""
        gathered = tensor.new_empty(self.size * len(tensor), *tensor.shape[1:])
        if self._is_apart:
            return gathered.zero_()
        _all_gather(gathered, tensor)
        self.num_collectives += 1
        self.num_sent_bytes += tensor.nbytes
        return gathered

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor by its sum over the ranks, in place; each rank gets the same bits."""
        if self._is_apart:
            return
        distributed.all_reduce(tensor)
        self.num_collectives += 1
        self.num_sent_bytes += tensor.nbytes

    def gather_objects(self, one: Any) -> list[Any]:
        """The object of each rank, which can be pickled. Not to be captured."""
        gathered: list[Any] = [None] * self.size
        distributed.all_gather_object(gathered, one)
        return gathered

    def agree(self, one: bool) -> bool:
        """Whether it is so on every rank. Not to be captured."""
        return all(self.gather_objects(one))

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """While the block runs, tensors are not exchanged: this rank computes alone, with zeros for what the others would send.

        The block takes the memory that it takes with them, and a rank may fail in it while the others go on.
        """
        self._is_apart = True
        try:
            yield
        finally:
            self._is_apart = False

    def close(self, *, is_broken: bool = False) -> None:
        """Without the others where they are gone: NCCL could wait for them, so that it is left to the end of the process."""
        if distributed.is_initialized() and not (is_broken and distributed.get_backend() == "nccl"):
            distributed.destroy_process_group()

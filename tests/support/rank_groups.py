"""Groups of ranks that count what they send: real ones over gloo, and one without other ranks."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from patience import PATIENCE_S


class LoneRank:
    """A rank without the others: an all-reduce leaves its tensor as it is. For shapes and counts."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.sent: list[int] = []
        """The bytes of each tensor that was summed."""

    def all_reduce(self, tensor: torch.Tensor) -> None:
        assert tensor.is_contiguous()
        self.sent.append(tensor.numel() * tensor.element_size())


class GlooRanks(LoneRank):
    """The first `size` processes of `run_ranks`."""

    def __init__(self, size: int) -> None:
        """Every process makes each group, also those it is not in."""
        super().__init__(torch.distributed.get_rank(), size)
        self._group = torch.distributed.new_group(list(range(size)))

    def all_reduce(self, tensor: torch.Tensor) -> None:
        super().all_reduce(tensor)
        torch.distributed.all_reduce(tensor, group=self._group)


def run_ranks(world_size: int, work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `work(rank)`, a function of a module, returns in each of so many processes that can reach each other over gloo."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["mii_serve.models.assembly", "mii_serve.engine.kernels.sharded", "mii_serve.engine.batched"]
    )
    started = [processes.Process(target=_rank, args=(rank, world_size, work, folder)) for rank in range(world_size)]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE_S)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [0] * world_size, codes
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, work: Callable[[int], Any], folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=PATIENCE_S),
    )
    torch.save(work(rank), folder / f"rank-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

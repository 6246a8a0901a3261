"""What rank 0 asks of all ranks, and what each of them does with it."""

from __future__ import annotations

import hashlib
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from mii_serve.engine import Engine
from mii_serve.engine.probe import Probe
from mii_serve.engine.ranks.group import RankGroup
from mii_serve.engine.turns import Turn
from mii_serve.types import StepPlan

OrderName = Literal["warmup", "run", "launch", "predict", "remove_checker", "restore_checker", "digests", "memory", "close"]


@dataclass(frozen=True, slots=True)
class Order:
    name: OrderName
    argument: Any = None


class RankEngine(Engine, Protocol):
    """An engine that can be one of several ranks. It decodes in the turn: `launch` leaves nothing to `take_decoded`."""

    def launch(self, plan: StepPlan) -> Turn: ...

    def probe(self) -> Probe: ...

    def states(self) -> list[torch.Tensor]:
        """The sampler state of every latent shape in use."""
        ...


_removed: list[AbstractContextManager[None]] = []
"""The safety checker's removals that are in force in this process."""


def execute(engine: RankEngine, group: RankGroup, order: Order) -> Any:
    """Run an order on this rank, and return what it gives."""
    match order.name:
        case "warmup":
            return engine.warmup()
        case "run":
            return engine.run(order.argument)
        case "launch":
            return engine.launch(order.argument)
        case "predict":
            return engine.probe().predict(order.argument)
        case "remove_checker":
            removal = engine.probe().without_checker()
            removal.__enter__()
            return _removed.append(removal)
        case "restore_checker":
            return _removed.pop().__exit__(None, None, None)
        case "digests":
            return group.gather_objects(_digest(engine.states()))
        case "memory":
            return group.gather_objects(memory_bytes(engine.description.device))
        case "close":
            raise AssertionError("each rank closes in its own way")


def memory_bytes(device: str) -> int:
    """On a GPU the most that this process has allocated there, on a CPU its resident memory."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _digest(tensors: list[torch.Tensor]) -> str:
    """The same text for the same bits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

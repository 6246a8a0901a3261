"""The LoRAs of a batched engine: a bounded pool of what combinations of them add, on the device, shared by all samples.

A combination whose ranks add up to at most the pool's rank has a row of the pool: samples with it share UNet calls with samples
that have other combinations or none. Row 0 is zeros, and stands for none. A combination that changes convolutions or has a
higher rank is kept by itself, and its samples share calls with each other alone.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mii_serve.engine.kernels.loras import PROMPT_LAYERS, TIME_LAYERS, CallLoras, LoraLayout, LoraRows, OneLora
from mii_serve.engine.loras import Changes, LoraStore, applied
from mii_serve.engine.upload import upload
from mii_serve.errors import ModelError
from mii_serve.models.loras import LoraAdapter
from mii_serve.types import MAX_LORAS, MAX_SHARED_LORA_RANK, Capabilities, LoraChoice, LoraInfo, LoraParts

RANK_STEP = 8
NUM_SPARE_ROWS = 4
"""Combinations kept beyond those in use."""


@dataclass(slots=True, kw_only=True, eq=False)
class LoraEntry:
    """One combination on the device, in use while `num_users` is not 0.

    `text_encoder`, `of_prompts` and `of_times` are what it changes of the text encoder and of the UNet's layers that depend on
    a prompt or a timestep alone. The other layers are in `row` of the pool up to `rank`, or in `one`.
    """

    parts: LoraParts
    row: int
    text_encoder: Changes
    of_prompts: Changes
    of_times: Changes
    rank: int = 0
    one: OneLora | None = None
    num_users: int = 0

    @property
    def time_parts(self) -> LoraParts:
        """The same, or none where it changes nothing of what depends on a timestep alone."""
        return self.parts if self.of_times else ()


class BatchedLoras:
    """Implements what an engine needs of LoRAs around a kernel set that has a `lora_layout`. For the engine's own thread."""

    def __init__(self, pipeline: Any, layout: LoraLayout, adapters: Mapping[str, LoraAdapter], *, max_in_use: int) -> None:
        """`max_in_use` is the largest number of different combinations that are in use at once."""
        self._pipeline = pipeline
        self._layout = layout
        self._num_rows = 1 + max_in_use + NUM_SPARE_ROWS
        self._known: OrderedDict[LoraParts, LoraEntry] = OrderedDict()
        self._free = list(reversed(range(1, self._num_rows)))
        self._down = self._up = torch.zeros(0)
        self.rank = 0
        """Of the pool's rows; grows as LoRAs are added. For v1-4 in half precision a row of rank 64 has 48 MB."""
        self.store = LoraStore(pipeline, {}, self._describe)
        for adapter in adapters.values():
            self.add(adapter)

    def add(self, adapter: LoraAdapter) -> LoraInfo:
        """Let requests name it, and make room for every combination with it that may have a row.

        Raises:
            ModelError: there is no memory for it.
        """
        info = self._describe(adapter)
        others = [other for other in self.store.loras.values() if other.name != info.name]
        ranks = sorted((one.rank for one in (info, *others) if one.shares_calls), reverse=True)
        self._reserve(min(sum(ranks[:MAX_LORAS]), MAX_SHARED_LORA_RANK))
        return self.store.add(adapter)

    def load(self, name: str, path: Path) -> LoraAdapter:
        """See `Loras`."""
        return self.store.load(name, path)

    def forget_unused(self, in_use: set[str]) -> None:
        """Forget what was removed, but for these revisions."""
        self.store.forget_unused(in_use)

    def remove(self, name: str) -> None:
        """No request can name it any more; those that are accepted keep it."""
        self.store.remove(name)

    def added_to(self, capabilities: Capabilities) -> Capabilities:
        """With the LoRAs that there are now."""
        return self.store.added_to(capabilities)

    def acquire(self, choice: LoraChoice) -> LoraEntry | None:
        """The entry of a combination, in use until it has been released as often as acquired; None for no LoRAs."""
        if not choice:
            return None
        if (entry := self._known.get(choice.parts)) is None:
            entry = self._known[choice.parts] = self._new_entry(choice)
        self._known.move_to_end(choice.parts)
        entry.num_users += 1
        return entry

    def release(self, entry: LoraEntry | None) -> None:
        if entry is not None:
            entry.num_users -= 1

    def of_call(self, entries: Sequence[LoraEntry | None]) -> CallLoras | None:
        """What the samples of a call add, one entry for each; None where none has any."""
        used = [entry for entry in entries if entry is not None and (entry.rank or entry.one is not None)]
        if not used:
            return None
        if used[0].one is not None:
            assert all(entry is used[0] for entry in entries), "these samples cannot share a UNet call"
            return used[0].one
        indices = [entry.row if entry is not None and entry.rank else 0 for entry in entries]
        rows = upload(torch.tensor(indices), self._down.device)
        rank = max(entry.rank for entry in used)
        return LoraRows(self._layout, self._down[:, :rank].index_select(0, rows), self._up[:, :rank].index_select(0, rows))

    @contextlib.contextmanager
    def encoding(self, parts: LoraParts) -> Iterator[None]:
        """Within it the text encoder has the changes of an entry in use, and so have the UNet's layers that depend on a prompt
        alone."""
        if not parts:
            yield
            return
        entry = self._known[parts]
        with applied(self._pipeline.text_encoder, entry.text_encoder), applied(self._pipeline.unet, entry.of_prompts):
            yield

    @contextlib.contextmanager
    def timing(self, parts: LoraParts) -> Iterator[None]:
        """Within it the UNet's layers that depend on a timestep alone have the changes of an entry in use."""
        if not parts:
            yield
            return
        with applied(self._pipeline.unet, self._known[parts].of_times):
            yield

    def _describe(self, adapter: LoraAdapter) -> LoraInfo:
        others = self._layout.others(adapter.unet)
        rank = max((one.rank for one in adapter.unet.values()), default=0)
        note = ""
        if others:
            note = f"it changes {len(others)} convolutions, so its images share UNet calls with each other only"
        elif rank > MAX_SHARED_LORA_RANK:
            note = f"its rank is above {MAX_SHARED_LORA_RANK}, so its images share UNet calls with each other only"
        return LoraInfo(name=adapter.name, revision=adapter.revision, rank=rank, shares_calls=not note, note=note)

    def _new_entry(self, choice: LoraChoice) -> LoraEntry:
        combination = self.store.combination(choice)
        if not self._free:
            idle = next(entry for entry in self._known.values() if not entry.num_users)
            del self._known[idle.parts]
            self._free.append(idle.row)
        unet = self._pipeline.unet
        like = torch.zeros(0, dtype=unet.dtype, device=self._pipeline.device)
        entry = LoraEntry(
            parts=choice.parts,
            row=self._free.pop(),
            text_encoder={name: change.to(like) for name, change in combination.text_encoder.items()},
            of_prompts=_on_device(combination.unet, PROMPT_LAYERS, like),
            of_times=_on_device(combination.unet, TIME_LAYERS, like),
        )
        if not choice.shares_calls:
            others = set(combination.unet) - set(entry.of_prompts) - set(entry.of_times)
            entry.one = OneLora({unet.get_submodule(name): combination.unet[name].to(like) for name in sorted(others)})
            return entry
        ranks = [change.rank for name, change in combination.unet.items() if name in self._layout.layers]
        entry.rank = _rounded(max(ranks, default=0))
        assert entry.rank <= self.rank, "there is room for every combination that may have a row"
        if entry.rank:
            for pool in (self._down, self._up):
                pool[entry.row].zero_()
            self._layout.write(combination.unet, self._down[entry.row], self._up[entry.row])
        return entry

    def _reserve(self, rank: int) -> None:
        """Let the rows of the pool have this rank at least.

        Raises:
            ModelError: there is no memory for them.
        """
        if (rank := _rounded(rank)) <= self.rank:
            return
        layout, unet = self._layout, self._pipeline.unet
        try:
            down, up = (
                torch.zeros(self._num_rows, rank, width, dtype=unet.dtype, device=self._pipeline.device)
                for width in (layout.num_inputs, layout.num_outputs)
            )
        except torch.OutOfMemoryError as error:
            raise ModelError(f"lora: no memory for {self._num_rows} combinations of LoRAs of rank {rank}") from error
        if self.rank:
            down[:, : self.rank], up[:, : self.rank] = self._down, self._up
        self._down, self._up, self.rank = down, up, rank


def _rounded(rank: int) -> int:
    return -(-rank // RANK_STEP) * RANK_STEP


def _on_device(changes: Changes, ends: tuple[str, ...], like: torch.Tensor) -> Changes:
    """Those of layers whose names end so."""
    return {name: change.to(like) for name, change in changes.items() if name.endswith(ends)}

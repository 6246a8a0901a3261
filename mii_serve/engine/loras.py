"""The LoRAs of an engine: those that requests can name, and what a combination of them adds to the model's layers.

A combination is one low-rank change: the ranks of its LoRAs one after the other, their scales folded in. `applied` adds it to
the outputs of a module's layers, as PEFT does: output + up(down(input)).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import conv2d, linear

from mii_serve.errors import InvalidRequestError
from mii_serve.models.loras import LayerShapes, LoraAdapter, LowRank, load_lora
from mii_serve.types import Capabilities, LoraChoice, LoraInfo, LoraParts

MAX_COMBINATIONS = 64
"""Kept on the CPU, the least recently used one is dropped first."""


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What is added to the output of one layer: `up` · `down` · input. Scales and factors are in `up`."""

    down: torch.Tensor
    up: torch.Tensor

    @property
    def rank(self) -> int:
        return len(self.down)

    def to(self, like: torch.Tensor) -> Change:
        return Change(self.down.to(like), self.up.to(like))

    def of(self, layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        """For the layer's inputs, in the shape of its outputs."""
        if isinstance(layer, nn.Conv2d):
            reduced = conv2d(inputs, self.down, None, layer.stride, layer.padding, layer.dilation)
            return conv2d(reduced, self.up)
        return linear(linear(inputs, self.down), self.up)


Changes = Mapping[str, Change]
"""By the names of the layers in a module."""


@dataclass(frozen=True, slots=True, eq=False)
class Combination:
    """What the LoRAs of a request add, in float32 on the CPU."""

    parts: LoraParts
    unet: Changes
    text_encoder: Changes

    @classmethod
    def of(cls, parts: LoraParts, adapters: Mapping[str, LoraAdapter]) -> Combination:
        """`adapters` are by revision."""
        scaled = [(adapters[revision], scale) for revision, scale in parts]
        return cls(
            parts=parts,
            unet=_joined([(adapter.unet, scale) for adapter, scale in scaled]),
            text_encoder=_joined([(adapter.text_encoder, scale) for adapter, scale in scaled]),
        )


NOTHING = Combination((), {}, {})


def _joined(scaled: list[tuple[Mapping[str, LowRank], float]]) -> dict[str, Change]:
    names = dict.fromkeys(name for layers, _ in scaled for name in layers)
    joined = {}
    for name in names:
        found = [(layers[name], scale) for layers, scale in scaled if name in layers]
        down = torch.cat([one.down.float() for one, _ in found])
        up = torch.cat([one.up.float() * (scale * one.factor) for one, scale in found], dim=1)
        joined[name] = Change(down, up)
    return joined


class LoraStore:
    """The LoRAs that requests can name, and those removed that accepted requests still need.

    `loras` and `load` are for any thread; the rest is for the engine's own.
    """

    def __init__(
        self, pipeline: Any, adapters: Mapping[str, LoraAdapter], describe: Callable[[LoraAdapter], LoraInfo] | None = None
    ) -> None:
        """`describe` says how an engine computes a LoRA; without it all share calls."""
        self._shapes = LayerShapes.of(pipeline)
        self._describe = describe or (lambda adapter: LoraInfo(name=adapter.name, revision=adapter.revision, rank=adapter.rank))
        self._named: dict[str, LoraAdapter] = {}
        self._removed: dict[str, LoraAdapter] = {}
        self._combinations: OrderedDict[LoraParts, Combination] = OrderedDict()
        self.loras: Mapping[str, LoraInfo] = {}
        for adapter in adapters.values():
            self.add(adapter)

    def added_to(self, capabilities: Capabilities) -> Capabilities:
        """With the LoRAs that there are now."""
        return replace(capabilities, loras=self.loras)

    def load(self, name: str, path: Path) -> LoraAdapter:
        """
        Raises:
            ModelError: it cannot be read, is something else, or is for another model.
        """
        return load_lora(name, path, self._shapes)

    def add(self, adapter: LoraAdapter) -> LoraInfo:
        """Let requests name it; one of the same name before it is removed."""
        self.remove(adapter.name)
        self._named[adapter.name] = adapter
        info = self._describe(adapter)
        self.loras = {**self.loras, adapter.name: info}
        return info

    def remove(self, name: str) -> None:
        """No request can name it any more; unknown names are ignored."""
        if (adapter := self._named.pop(name, None)) is not None:
            self._removed[adapter.revision] = adapter
            self.loras = {known: info for known, info in self.loras.items() if known != name}

    def forget_unused(self, in_use: set[str]) -> None:
        """Forget what was removed, but for these revisions."""
        self._removed = {revision: adapter for revision, adapter in self._removed.items() if revision in in_use}
        known = {adapter.revision for adapter in self._named.values()} | self._removed.keys()
        for parts in [one for one in self._combinations if not {revision for revision, _ in one} <= known]:
            del self._combinations[parts]

    @property
    def has_removed(self) -> bool:
        return bool(self._removed)

    def check(self, choice: LoraChoice) -> None:
        """
        Raises:
            InvalidRequestError: a LoRA of this choice is not here, or not any more.
        """
        known = self._by_revision()
        if any(revision not in known for revision, _ in choice.parts):
            raise InvalidRequestError("loras", "must be LoRAs of this server, and one was removed or replaced meanwhile")

    def combination(self, choice: LoraChoice) -> Combination:
        """What a choice that `check` has accepted adds."""
        if not choice:
            return NOTHING
        if (known := self._combinations.get(choice.parts)) is None:
            known = self._combinations[choice.parts] = Combination.of(choice.parts, self._by_revision())
            if len(self._combinations) > MAX_COMBINATIONS:
                self._combinations.popitem(last=False)
        self._combinations.move_to_end(choice.parts)
        return known

    def _by_revision(self) -> dict[str, LoraAdapter]:
        return self._removed | {adapter.revision: adapter for adapter in list(self._named.values())}


@contextlib.contextmanager
def applied(module: nn.Module, changes: Changes) -> Iterator[None]:
    """Within it, calls of the module's layers have these changes."""
    with contextlib.ExitStack() as undo:
        for name, change in changes.items():
            handle = module.get_submodule(name).register_forward_hook(_hook(change))
            undo.callback(handle.remove)
        yield


def _hook(change: Change) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
    def add(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + change.to(output).of(layer, inputs[0])

    return add

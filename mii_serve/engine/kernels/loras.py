"""What LoRAs add in a UNet call: low-rank changes of linear layers, another one for each sample, or one change for the call.

The rows of `LoraRows` are what the layers of the transformers add, but for the keys and values of the cross-attentions, which
depend on the prompt alone. They are padded to one rank with zeros, which add nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.nn.functional import linear

from mii_serve.engine.loras import Change, Changes

PROMPT_LAYERS = ("attn2.to_k", "attn2.to_v")
"""The ends of the names of layers whose inputs depend on the prompt alone."""
TIME_LAYERS = (".time_emb_proj", "time_embedding.linear_1", "time_embedding.linear_2")
"""Of those whose inputs depend on the timestep alone."""


class CallLoras(Protocol):
    """What is added in a call, with one entry per sample or, after `taken`, per row."""

    @property
    def layers(self) -> Iterable[nn.Module]:
        """Those to whose outputs something is added."""
        ...

    def taken(self, indices: torch.Tensor) -> CallLoras:
        """The same for other entries; `indices` are int64 on the device."""
        ...

    def added(self, layer: nn.Module, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """A layer's outputs with what is added to them, in place or not.

        Inputs and outputs of a linear layer are entries × tokens × channels, and so are those of a convolution of one pixel.
        """
        ...


class LoraLayout:
    """Where the layers are along the widths of `LoraRows`: the `layers` that each entry can have its own change of, by name."""

    def __init__(self, unet: Any) -> None:
        self.layers: dict[str, nn.Module] = dict(_row_layers(unet))
        self.num_inputs = self.num_outputs = 0
        self.places: dict[nn.Module, tuple[slice, slice]] = {}
        for layer in self.layers.values():
            outputs, inputs = layer.weight.shape[:2]  # type: ignore[index]
            self.places[layer] = (
                slice(self.num_inputs, self.num_inputs + inputs),
                slice(self.num_outputs, self.num_outputs + outputs),
            )
            self.num_inputs, self.num_outputs = self.num_inputs + inputs, self.num_outputs + outputs

    def others(self, names: Iterable[str]) -> list[str]:
        """The layers that can change only for a whole call."""
        return [name for name in names if name not in self.layers and not name.endswith((*PROMPT_LAYERS, *TIME_LAYERS))]

    def write(self, changes: Changes, down: torch.Tensor, up: torch.Tensor) -> None:
        """Write changes into an entry of zeros, rank × inputs and rank × outputs of all layers."""
        for name, layer in self.layers.items():
            if (change := changes.get(name)) is not None:
                inputs, outputs = self.places[layer]
                down[: change.rank, inputs] = change.down.flatten(1).to(down)
                up[: change.rank, outputs] = change.up.flatten(1).t().to(up)


def _row_layers(unet: Any) -> Iterable[tuple[str, nn.Module]]:
    for name, transformer in unet.named_modules():
        if isinstance(transformer, Transformer2DModel):
            yield f"{name}.proj_in", transformer.proj_in
            for index, block in enumerate(transformer.transformer_blocks):
                yield from _block_layers(f"{name}.transformer_blocks.{index}", block)
            yield f"{name}.proj_out", transformer.proj_out


def _block_layers(name: str, block: BasicTransformerBlock) -> Iterable[tuple[str, nn.Module]]:
    own, cross = block.attn1, block.attn2
    yield from ((f"{name}.attn1.to_q", own.to_q), (f"{name}.attn1.to_k", own.to_k), (f"{name}.attn1.to_v", own.to_v))
    yield f"{name}.attn1.to_out.0", own.to_out[0]
    yield f"{name}.attn2.to_q", cross.to_q
    yield f"{name}.attn2.to_out.0", cross.to_out[0]
    yield f"{name}.ff.net.0.proj", block.ff.net[0].proj
    yield f"{name}.ff.net.2", block.ff.net[2]


@dataclass(frozen=True, slots=True, eq=False)
class LoraRows:
    """Implements `CallLoras` with a change for each entry: `down` is entries × rank × inputs of all layers, `up` entries × rank
    × outputs of all layers."""

    layout: LoraLayout
    down: torch.Tensor
    up: torch.Tensor

    @property
    def layers(self) -> Iterable[nn.Module]:
        return self.layout.places

    def taken(self, indices: torch.Tensor) -> LoraRows:
        return LoraRows(self.layout, self.down.index_select(0, indices), self.up.index_select(0, indices))

    def added(self, layer: nn.Module, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """See `CallLoras`: in place."""
        if (place := self.layout.places.get(layer)) is None:
            return outputs
        reduced = torch.bmm(inputs, self.down[:, :, place[0]].transpose(1, 2))
        return outputs.baddbmm_(reduced, self.up[:, :, place[1]])

    def is_merged(self, layer: nn.Module, num_tokens: int) -> bool:
        """Whether a changed weight for each entry is less to write and read than the layer's inputs and outputs once more."""
        inputs, outputs = (one.stop - one.start for one in self.layout.places[layer])
        return 2 * inputs * outputs < num_tokens * (inputs + 2 * outputs)

    def merged(self, layer: nn.Module) -> torch.Tensor:
        """The layer's weight for each entry, entries × outputs × inputs."""
        inputs, outputs = self.layout.places[layer]
        weight: torch.Tensor = layer.weight.flatten(1)  # type: ignore[operator]
        up, down = self.up[:, :, outputs], self.down[:, :, inputs]
        return torch.baddbmm(weight.expand(len(up), *weight.shape), up.transpose(1, 2), down)


@dataclass(frozen=True, slots=True, eq=False)
class OneLora:
    """Implements `CallLoras` with the same change for all entries, of linear layers and of convolutions."""

    changes: Mapping[nn.Module, Change]

    @property
    def layers(self) -> Iterable[nn.Module]:
        return self.changes

    def taken(self, indices: torch.Tensor) -> OneLora:
        return self

    def added(self, layer: nn.Module, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        if (change := self.changes.get(layer)) is None:
            return outputs
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            return outputs + change.of(layer, inputs)
        return outputs + linear(linear(inputs, change.down.flatten(1)), change.up.flatten(1))

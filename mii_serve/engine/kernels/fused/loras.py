"""The fused UNet with LoRAs: another low-rank change for each sample, added to what the fused layers make.

A change is computed in one of two ways, the one that moves fewer bytes. Where a sample has many tokens beside the size of a
layer, the layer's weight is changed for each sample in every call, and the layer is one batched matrix product. Elsewhere the
change is two thin batched products, the second of which adds to the layer's outputs in place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.nn.functional import gelu, linear

from mii_serve.engine.kernels.fused.forward import FusedPass, Image, MergedBlock, MergedTransformer
from mii_serve.engine.kernels.fused.operations import tokens_of
from mii_serve.engine.kernels.loras import LoraRows


@dataclass(slots=True, eq=False)
class FusedLoraPass(FusedPass):
    """See `FusedPass`; `loras` have one entry per sample at first. Tokens of an entry are next to each other."""

    loras: LoraRows = field(kw_only=True)

    def _expand_to_rows(self, total: torch.Tensor, skips: list[Image], *tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert self.sample_of_row is not None
        self.loras = self.loras.taken(self.sample_of_row)
        return FusedPass._expand_to_rows(self, total, skips, *tokens)

    def _project_out(
        self, transformer: Transformer2DModel, merged: MergedTransformer, tokens: torch.Tensor, total: torch.Tensor
    ) -> None:
        """What is left to add to the tokens is in `merged.after` for the layer's own weight, so the change alone sees it."""
        assert merged.left is not None
        FusedPass._accumulate(self, transformer.proj_out, tokens, tokens_of(total), len(total))
        self._change(transformer.proj_out, tokens + merged.left.to(tokens.dtype), tokens_of(total), len(total))

    def _query_key_value(self, own: nn.Module, merged: MergedBlock, normed: torch.Tensor, num_entries: int) -> torch.Tensor:
        layers: tuple[nn.Module, ...] = own.to_q, own.to_k, own.to_v  # type: ignore[assignment]
        if self._is_merged(layers[0], normed, num_entries):
            weights = torch.cat([self.loras.merged(layer) for layer in layers], dim=1)
            return torch.bmm(normed.unflatten(0, (num_entries, -1)), weights.transpose(1, 2)).flatten(0, 1)
        projected = FusedPass._query_key_value(self, own, merged, normed, num_entries)
        for layer, part in zip(layers, projected.chunk(3, dim=1), strict=True):
            self._change(layer, normed, part, num_entries)
        return projected

    def _feed_forward(self, block: BasicTransformerBlock, normed: torch.Tensor, tokens: torch.Tensor, num_entries: int) -> None:
        widened, narrowed = block.ff.net[0].proj, block.ff.net[2]
        if self._is_merged(widened, normed, num_entries):
            of_entries = normed.chunk(num_entries), tokens.chunk(num_entries)
            weights = self.loras.merged(widened), self.loras.merged(narrowed)
            for own_normed, own_tokens, wide, narrow in zip(*of_entries, *weights, strict=True):
                own_tokens.addmm_(self.kernels.operations.linear_geglu(own_normed, wide, widened.bias), narrow.t())
            return
        hidden = linear(normed, widened.weight, widened.bias)
        self._change(widened, normed, hidden, num_entries)
        value, gate = hidden.chunk(2, dim=-1)
        self._accumulate(narrowed, value * gelu(gate), tokens, num_entries)

    def _product(
        self, layer: nn.Module, inputs: torch.Tensor, num_entries: int, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self._is_merged(layer, inputs, num_entries):
            of_entries, weights = inputs.unflatten(0, (num_entries, -1)), self.loras.merged(layer).transpose(1, 2)
            if bias is None:
                return torch.bmm(of_entries, weights).flatten(0, 1)
            return torch.baddbmm(bias, of_entries, weights).flatten(0, 1)
        outputs = FusedPass._product(self, layer, inputs, num_entries, bias)
        self._change(layer, inputs, outputs, num_entries)
        return outputs

    def _accumulate(self, layer: nn.Module, inputs: torch.Tensor, into: torch.Tensor, num_entries: int) -> None:
        if self._is_merged(layer, inputs, num_entries):
            of_entries = inputs.unflatten(0, (num_entries, -1))
            into.unflatten(0, (num_entries, -1)).baddbmm_(of_entries, self.loras.merged(layer).transpose(1, 2))
            return
        FusedPass._accumulate(self, layer, inputs, into, num_entries)
        self._change(layer, inputs, into, num_entries)

    def _change(self, layer: nn.Module, inputs: torch.Tensor, outputs: torch.Tensor, num_entries: int) -> None:
        """Add what the LoRAs add, in place. Both are matrices, tokens × channels, of as many tokens for each entry."""
        into = outputs.unflatten(0, (num_entries, -1))
        self.loras.added(layer, inputs.unflatten(0, (num_entries, -1)), into)

    def _is_merged(self, layer: nn.Module, inputs: torch.Tensor, num_entries: int) -> bool:
        return self.loras.is_merged(layer, len(inputs) // num_entries)

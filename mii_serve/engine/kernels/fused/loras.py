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

from mii_serve.engine.kernels.fused.forward import FusedPass, Image, MergedBlock, normalized
from mii_serve.engine.kernels.fused.operations import tokens_of
from mii_serve.engine.kernels.loras import LoraRows


@dataclass(slots=True, eq=False)
class FusedLoraPass(FusedPass):
    """See `FusedPass`; `loras` have one entry per sample at first. Tokens of an entry are next to each other."""

    loras: LoraRows = field(kw_only=True)

    def _transformer(self, transformer: Transformer2DModel, hidden: Image, skips: list[Image]) -> Image:
        operations, merged = self.kernels.operations, self.kernels.merged(transformer)
        normed, total = normalized(
            operations, hidden, transformer.norm, is_silu=False, after=merged.after, keeps_total=True
        )  # fmt: skip
        assert total is not None
        tokens = self._product(transformer.proj_in, tokens_of(normed), len(total), transformer.proj_in.bias)
        tokens, total = self._blocks(transformer, merged, tokens, total, skips)
        assert merged.left is not None
        # What is left to add to the tokens is in `after` for the layer's own weight, so the change alone sees it.
        summed = tokens_of(total)
        summed.addmm_(tokens, transformer.proj_out.weight.flatten(1).t())
        self._change(transformer.proj_out, tokens + merged.left.to(tokens.dtype), summed, len(total))
        return Image(total)

    def _block(
        self,
        block: BasicTransformerBlock,
        merged: MergedBlock,
        tokens: torch.Tensor,
        total: torch.Tensor,
        num_tokens: int,
        skips: list[Image],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        operations, own, cross = self.kernels.operations, block.attn1, block.attn2
        normed = operations.layer_norm(tokens, block.norm1, merged.biases[0])
        projected = self._query_key_value(own, merged, normed, len(total))
        projected = projected.view(-1, num_tokens, 3, own.heads, projected.shape[1] // 3 // own.heads)
        attended = operations.attention(projected[:, :, 0], projected[:, :, 1], projected[:, :, 2]).view(len(tokens), -1)
        self._accumulate(own.to_out[0], attended, tokens, len(total))
        query = self._product(cross.to_q, operations.layer_norm(tokens, block.norm2, merged.biases[1]), len(total))
        if self.sample_of_row is not None:
            self.loras = self.loras.taken(self.sample_of_row)
            total, tokens, query = self._expand_to_rows(total, skips, tokens, query)
        query, keys, values = (
            one.unflatten(-1, (cross.heads, -1))
            for one in (
                query.view(-1, num_tokens, query.shape[1]),
                self.prompts[..., self.kernels.keys_of(cross)],
                self.prompts[..., self.kernels.values_of(cross)],
            )
        )
        attended = operations.attention(query, keys, values).view(len(tokens), -1)
        self._accumulate(cross.to_out[0], attended, tokens, len(total))
        self._feed_forward(block, operations.layer_norm(tokens, block.norm3, merged.biases[2]), tokens, len(total))
        return tokens, total

    def _query_key_value(self, own: nn.Module, merged: MergedBlock, normed: torch.Tensor, num_entries: int) -> torch.Tensor:
        layers: tuple[nn.Module, ...] = own.to_q, own.to_k, own.to_v  # type: ignore[assignment]
        if self._is_merged(layers[0], normed, num_entries):
            weights = torch.cat([self.loras.merged(layer) for layer in layers], dim=1)
            return torch.bmm(normed.unflatten(0, (num_entries, -1)), weights.transpose(1, 2)).flatten(0, 1)
        projected = linear(normed, merged.query_key_value)
        for layer, part in zip(layers, projected.chunk(3, dim=1), strict=True):
            self._change(layer, normed, part, num_entries)
        return projected

    def _feed_forward(self, block: BasicTransformerBlock, normed: torch.Tensor, tokens: torch.Tensor, num_entries: int) -> None:
        """In place: it is added to the tokens."""
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
        """The layer's outputs, with this bias."""
        if self._is_merged(layer, inputs, num_entries):
            of_entries, weights = inputs.unflatten(0, (num_entries, -1)), self.loras.merged(layer).transpose(1, 2)
            if bias is None:
                return torch.bmm(of_entries, weights).flatten(0, 1)
            return torch.baddbmm(bias, of_entries, weights).flatten(0, 1)
        outputs = linear(inputs, layer.weight.flatten(1), bias)  # type: ignore[operator]
        self._change(layer, inputs, outputs, num_entries)
        return outputs

    def _accumulate(self, layer: nn.Module, inputs: torch.Tensor, into: torch.Tensor, num_entries: int) -> None:
        """Add the layer's outputs without its bias, in place."""
        if self._is_merged(layer, inputs, num_entries):
            of_entries = inputs.unflatten(0, (num_entries, -1))
            into.unflatten(0, (num_entries, -1)).baddbmm_(of_entries, self.loras.merged(layer).transpose(1, 2))
            return
        into.addmm_(inputs, layer.weight.flatten(1).t())  # type: ignore[operator]
        self._change(layer, inputs, into, num_entries)

    def _change(self, layer: nn.Module, inputs: torch.Tensor, outputs: torch.Tensor, num_entries: int) -> None:
        """Add what the LoRAs add, in place. Both are matrices, tokens × channels, of as many tokens for each entry."""
        into = outputs.unflatten(0, (num_entries, -1))
        self.loras.added(layer, inputs.unflatten(0, (num_entries, -1)), into)

    def _is_merged(self, layer: nn.Module, inputs: torch.Tensor, num_entries: int) -> bool:
        return self.loras.is_merged(layer, len(inputs) // num_entries)

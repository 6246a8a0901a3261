"""The fused UNet with LoRAs: another low-rank change for each sample, added to what the fused layers make.

All stays fused but the feed-forward parts' first layer, whose gate needs the changed outputs. A change of a linear layer is two
batched matrix products, the second of which adds to the layer's outputs in place.
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
    """See `FusedPass`; `loras` have one entry per sample at first."""

    loras: LoraRows = field(kw_only=True)

    def _transformer(self, transformer: Transformer2DModel, hidden: Image, skips: list[Image]) -> Image:
        operations, merged = self.kernels.operations, self.kernels.merged(transformer)
        normed, total = normalized(
            operations, hidden, transformer.norm, is_silu=False, after=merged.after, keeps_total=True
        )  # fmt: skip
        assert total is not None
        before = tokens_of(normed)
        tokens = linear(before, transformer.proj_in.weight.flatten(1), transformer.proj_in.bias)
        self._add(transformer.proj_in, before, tokens, len(total))
        tokens, total = self._blocks(transformer, merged, tokens, total, skips)
        summed = tokens_of(total)
        summed.addmm_(tokens, transformer.proj_out.weight.flatten(1).t())
        assert merged.left is not None
        self._add(transformer.proj_out, tokens + merged.left.to(tokens.dtype), summed, len(total))
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
        projected = linear(normed, merged.query_key_value)
        width = projected.shape[1] // 3
        for index, layer in enumerate((own.to_q, own.to_k, own.to_v)):
            self._add(layer, normed, projected[:, index * width : (index + 1) * width], len(total))
        projected = projected.view(-1, num_tokens, 3, own.heads, width // own.heads)
        attended = operations.attention(projected[:, :, 0], projected[:, :, 1], projected[:, :, 2]).view(len(tokens), -1)
        tokens.addmm_(attended, own.to_out[0].weight.t())
        self._add(own.to_out[0], attended, tokens, len(total))
        normed = operations.layer_norm(tokens, block.norm2, merged.biases[1])
        query = linear(normed, cross.to_q.weight)
        self._add(cross.to_q, normed, query, len(total))
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
        tokens.addmm_(attended, cross.to_out[0].weight.t())
        self._add(cross.to_out[0], attended, tokens, len(total))
        widened, narrowed = block.ff.net[0].proj, block.ff.net[2]
        normed = operations.layer_norm(tokens, block.norm3, merged.biases[2])
        wide = linear(normed, widened.weight, widened.bias)
        self._add(widened, normed, wide, len(total))
        value, gate = wide.chunk(2, dim=-1)
        gated = value * gelu(gate)
        tokens.addmm_(gated, narrowed.weight.t())
        self._add(narrowed, gated, tokens, len(total))
        return tokens, total

    def _add(self, layer: nn.Module, inputs: torch.Tensor, outputs: torch.Tensor, num_entries: int) -> None:
        """Both are matrices, tokens × channels, of as many tokens for each entry. In place."""
        into = outputs.unflatten(0, (num_entries, -1))
        added = self.loras.added(layer, inputs.unflatten(0, (num_entries, -1)), into)
        assert added is into, "rows of LoRAs add in place"

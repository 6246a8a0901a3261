"""The row UNet with DeepSpeed's transformer blocks.

What is saved around the blocks stays saved: the times' projections, and the rows shared until the first block. Inside them
everything is DeepSpeed's, so keys and values of the prompts are made in every call, and a guided sample is two rows from the
first block on. For v1-4 that is 3 to 4 % of the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch

from mii_serve.engine.native.unet import RowCall, RowUNet


class DeepSpeedRowUNet(RowUNet):
    """Calls a UNet whose blocks `injection.inject` has replaced. What it knows of a prompt is the prompt's embedding."""

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        self.prompt_width = unet.config.cross_attention_dim

    def project_prompts(self, embeds: torch.Tensor) -> torch.Tensor:
        return embeds

    def _make_call(self, time: torch.Tensor, key_values: torch.Tensor, sample_of_row: torch.Tensor | None) -> RowCall:
        return _Call(self, time, key_values, sample_of_row)


class _Call(RowCall):
    def _block(self, block: Any, tokens: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._pending_rows is not None:
            tokens, hidden = self._part(tokens, hidden)
        # The kernels take the memory as it lies, whatever the strides.
        return block(tokens.contiguous(), encoder_hidden_states=self._key_values.contiguous()), hidden

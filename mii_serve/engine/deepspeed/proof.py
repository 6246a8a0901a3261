"""Asks the injected UNet what the UNet answered before the injection, so that wrong kernels are found before the first picture.

The questions are what such kernels have been seen to get wrong: a size whose tokens fill no block of the flash kernel, guided
and unguided rows together, and a prompt whose last token weighs most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mii_serve.engine.native.unet import RowUNet
from mii_serve.errors import UnusableEngineError

MAX_ERROR = 0.02
"""Of the answer's own size, root mean square. Half precision alone is an order of magnitude below it."""

LAST_TOKEN_WEIGHT = 8.0

NUM_ROWS = 3
"""Of each question: an unguided sample and a guided one."""


@dataclass(frozen=True)
class Proof:
    """Questions, and the answers of a UNet's own modules."""

    unet: Any
    num_tokens: int
    sizes: Sequence[tuple[int, int]]
    answers: list[torch.Tensor]

    @classmethod
    def ask(cls, unet: Any, *, num_tokens: int, sizes: Sequence[tuple[int, int]]) -> Proof:
        """To be called before the injection; `sizes` are latent heights and widths."""
        proof = cls(unet, num_tokens, tuple(sizes), [])
        proof.answers.extend(proof._answers(RowUNet(unet)))
        return proof

    def check(self, injected: RowUNet) -> float:
        """The largest error of the injected UNet's answers.

        Raises:
            UnusableEngineError: it is larger than half precision explains.
        """
        worst = 0.0
        for size, before, after in zip(self.sizes, self.answers, self._answers(injected), strict=True):
            error = float((after - before).square().mean().sqrt() / before.square().mean().sqrt())
            if not error <= MAX_ERROR:  # not a number is no answer either
                raise UnusableEngineError(
                    f"DeepSpeed's kernels are {error:.1%} off for latents of {size[0]} × {size[1]}, more than {MAX_ERROR:.0%}"
                )
            worst = max(worst, error)
        return worst

    def _answers(self, unet: RowUNet) -> list[torch.Tensor]:
        config, device, dtype = self.unet.config, self.unet.device, self.unet.dtype
        generator = torch.Generator().manual_seed(0)
        rows = torch.tensor([0, 1, 1], device=device)
        answers = []
        for size in self.sizes:
            latents = torch.randn(2, config.in_channels, *size, generator=generator)
            embeds = torch.randn(3, self.num_tokens, config.cross_attention_dim, generator=generator)
            embeds[:, -1] *= LAST_TOKEN_WEIGHT
            time = unet.embed_times(torch.tensor([999.0, 340.0], device=device))
            prompts = unet.project_prompts(embeds.to(device, dtype))
            answer = unet(latents.to(device, dtype, memory_format=torch.channels_last), time, prompts, rows)
            answers.append(answer.float())
        return answers

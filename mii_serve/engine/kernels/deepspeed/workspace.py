"""The memory that DeepSpeed's kernels work in: one piece for the whole process, taken once and large enough.

DeepSpeed would size it like the cache of a language model (0.6 GB for each row), allocate it in the first call, and allocate it
anew when a larger call comes, while captured graphs point into the old one. Here it is allocated before the first call for the
largest one the engine makes, and it stays where it is until it is released.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mii_serve.engine.kernels.deepspeed.injection import injected_attentions
from mii_serve.errors import UnusableEngineError

SMALLEST_HEAD = 32
ACTIVATIONS = 10 * SMALLEST_HEAD
"""Elements per token in DeepSpeed's formula (`GenWorkSpace`) for one row with one head of 32: see `_tokens_for`."""


@dataclass
class _Reserved:
    """What this process has taken; the workspace itself lives in DeepSpeed's extension."""

    num_elements: int = 0
    num_holders: int = 0
    device: str = ""


_reserved = _Reserved()


class Workspace:
    """A share in the process's workspace, until `release`."""

    def __init__(self, unet: Any, *, max_latent_pixels: int, sides: Iterable[int]) -> None:
        """Allocate room for calls of `max_latent_pixels` (rows × latent height × latent width), on latents whose height and
        width are among `sides`.

        Raises:
            UnusableEngineError: it does not fit into the device's memory, or a smaller one is in use.
        """
        attention = injected_attentions(unet)[0]
        self._operation = attention.workspace
        self._is_held = False
        needed = num_elements(unet, max_latent_pixels=max_latent_pixels, sides=sides)
        device = str(unet.device)
        if _reserved.num_holders and (needed > _reserved.num_elements or device != _reserved.device):
            raise UnusableEngineError("DeepSpeed has one workspace in a process, and a smaller one is in use")
        if not _reserved.num_holders:
            self._take(needed, device)
        _reserved.num_holders += 1
        self._is_held = True

    def release(self) -> None:
        """Free it with its last holder. Graphs captured over it cannot be used any more."""
        if self._is_held:
            self._is_held = False
            _reserved.num_holders -= 1
            if not _reserved.num_holders:
                self._operation.release_workspace()
                _reserved.num_elements = 0

    def _take(self, needed: int, device: str) -> None:
        tokens = _tokens_for(needed)
        try:
            # hidden size, heads, prompt length, rows, layers, ranks, cache elsewhere, rank, most and least tokens. The least
            # is the most: with less memory than that it would otherwise silently be smaller than requested.
            self._operation.allocate_workspace(SMALLEST_HEAD, 1, 0, 1, 0, 1, True, 0, tokens, tokens)
        except RuntimeError as error:
            raise UnusableEngineError(f"no memory for DeepSpeed's workspace of {2 * needed:,} bytes: {error}") from error
        _reserved.num_elements, _reserved.device = needed, device


def num_elements(unet: Any, *, max_latent_pixels: int, sides: Iterable[int]) -> int:
    """Float16 elements that the injected attention which needs most writes in a call of `max_latent_pixels`."""
    widths, sides = list(unet.config.block_out_channels), list(sides)
    most = 0
    for attention in injected_attentions(unet):
        level = widths.index(attention.config.hidden_size)
        # Odd sides are rounded up when they are halved, so a lower level may have more than a quarter of the tokens.
        share = max(-(-side // 2**level) / side for side in sides) ** 2
        per_token = elements_per_token(attention.config.hidden_size, attention.config.heads)
        most = max(most, int(max_latent_pixels * share * per_token) + 1)
    return most


def elements_per_token(hidden_size: int, heads: int) -> int:
    """Elements that `ds_linear_layer` writes per token: queries, keys, values, padded for the flash kernel, sorted by head."""
    head = hidden_size // heads
    if head > 128:
        return hidden_size  # no flash kernel, so only the projection of the output
    if head % 64 == 0:
        return 2 * 3 * hidden_size
    padded = 32 if head < 32 else 64 if head < 64 else 128
    return 3 * hidden_size + 2 * 3 * heads * padded


def _tokens_for(needed: int) -> int:
    """The least number of tokens t for which DeepSpeed takes as many elements: (activations + t) · t, by `GenWorkSpace`."""
    tokens = int((needed + ACTIVATIONS**2 / 4) ** 0.5 - ACTIVATIONS / 2)
    while (ACTIVATIONS + tokens) * tokens < needed:
        tokens += 1
    return tokens

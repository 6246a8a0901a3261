"""Prompts as the UNet's cross-attentions see them, made once and kept for whoever says the same.

Texts are encoded in batches of always the same size: kernels may round differently with the batch, and what a prompt becomes
must not depend on who came with it.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mii_serve.engine.native.unet import RowUNet
from mii_serve.engine.text import dropped_text

TEXTS_PER_BATCH = 4

NUM_SPARE_ROWS = 32
"""Prompts remembered beyond those in use; 4 MB each for v1-4 in half precision."""


@dataclass(slots=True, eq=False)
class Prompt:
    """`row` of `PromptBank.key_values` is this text's while somebody uses it; `dropped` is the part of it that did not fit."""

    text: str = field(repr=False)
    row: int
    dropped: str = field(repr=False)
    num_users: int = 0


class PromptBank:
    """`key_values` is rows × tokens × `RowUNet.prompt_width`.

    Of the prompts nobody uses the least recently used makes room; the empty one, most people's negative prompt, stays.
    """

    def __init__(self, pipeline: Any, unet: RowUNet, *, max_in_use: int, num_spare_rows: int = NUM_SPARE_ROWS) -> None:
        num_rows = max_in_use + num_spare_rows
        self._pipeline = pipeline
        self._unet = unet
        self._known: OrderedDict[str, Prompt] = OrderedDict()
        self._free = list(reversed(range(num_rows)))
        self.num_encoded = 0
        size = num_rows, pipeline.tokenizer.model_max_length, unet.prompt_width
        self.key_values = torch.zeros(size, dtype=pipeline.unet.dtype, device=pipeline.device)

    def acquire(self, texts: Sequence[str]) -> list[Prompt]:
        """One prompt for each text, in use until released as often as acquired."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        for text in texts:
            if (known := self._known.get(text)) is not None:
                known.num_users += 1  # before anybody is forgotten for the missing ones
        for i in range(0, len(missing), TEXTS_PER_BATCH):
            self._encode(missing[i : i + TEXTS_PER_BATCH])
        is_new = set(missing)
        for text in texts:
            self._known[text].num_users += text in is_new
            self._known.move_to_end(text)
        return [self._known[text] for text in texts]

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """What the text encoder makes of them, B × tokens × text width."""
        batches = [texts[i : i + TEXTS_PER_BATCH] for i in range(0, len(texts), TEXTS_PER_BATCH)]
        return torch.cat([self._embed(batch)[: len(batch)] for batch in batches])

    @contextlib.contextmanager
    def lent(self, embeds: torch.Tensor) -> Iterator[list[int]]:
        """Rows that hold these embedded prompts, B × tokens × text width, for as long as the block lasts."""
        rows = [self._free_row() for _ in embeds]
        try:
            for i in range(0, len(rows), TEXTS_PER_BATCH):
                batch = embeds[i : i + TEXTS_PER_BATCH]
                padded = torch.cat((batch, batch.new_zeros(TEXTS_PER_BATCH - len(batch), *batch.shape[1:])))
                self.key_values[rows[i : i + TEXTS_PER_BATCH]] = self._project(padded)[: len(batch)]
            yield rows
        finally:
            self._free.extend(rows)

    def release(self, prompts: Iterable[Prompt]) -> None:
        for prompt in prompts:
            prompt.num_users -= 1

    def _encode(self, texts: Sequence[str]) -> None:
        for text, projected in zip(texts, self._project(self._embed(texts)), strict=False):  # what is longer is padding
            row = self._free_row()
            self.key_values[row] = projected
            self._known[text] = Prompt(text, row, dropped_text(self._pipeline.tokenizer, text))
        self.num_encoded += len(texts)

    def _embed(self, texts: Sequence[str]) -> torch.Tensor:
        """One batch, padded."""
        padded = [*texts, *[""] * (TEXTS_PER_BATCH - len(texts))]
        embeds: torch.Tensor = self._pipeline.encode_prompt(padded, self._pipeline.device, 1, False)[0]
        return embeds

    def _project(self, embeds: torch.Tensor) -> torch.Tensor:
        return self._unet.project_prompts(embeds.to(self.key_values))

    def _free_row(self) -> int:
        if not self._free:
            idle = next(prompt for prompt in self._known.values() if not prompt.num_users and prompt.text)
            del self._known[idle.text]
            self._free.append(idle.row)
        return self._free.pop()

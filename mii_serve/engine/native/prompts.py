"""Prompts as the UNet sees them, encoded together and kept for the next request that says the same."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from mii_serve.engine.text import dropped_text

MAX_PROMPTS = 256
"""At v1-4's 77 × 768 in half precision, 30 MB."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPrompt:
    """`embeds` is tokens × width; `dropped` is the text that did not fit."""

    embeds: torch.Tensor = field(repr=False)
    dropped: str = field(repr=False)


class PromptCache:
    """Least recently used prompts go first; those a running sample holds live on in it."""

    def __init__(self, pipeline: Any, *, max_prompts: int = MAX_PROMPTS) -> None:
        self._pipeline = pipeline
        self._max_prompts = max_prompts
        self._encoded: OrderedDict[str, EncodedPrompt] = OrderedDict()
        self.num_encoded = 0

    def encode(self, prompts: Iterable[str]) -> dict[str, EncodedPrompt]:
        """All of these, the ones not known yet in one batch."""
        wanted = dict.fromkeys(prompts)
        missing = [prompt for prompt in wanted if prompt not in self._encoded]
        if missing:
            self._encode_missing(missing)
        found = {prompt: self._encoded[prompt] for prompt in wanted}
        for prompt in wanted:
            self._encoded.move_to_end(prompt)
        while len(self._encoded) > self._max_prompts:
            self._encoded.popitem(last=False)
        return found

    def _encode_missing(self, prompts: list[str]) -> None:
        embeds, _ = self._pipeline.encode_prompt(prompts, self._pipeline.device, 1, False)
        for prompt, row in zip(prompts, embeds, strict=True):
            self._encoded[prompt] = EncodedPrompt(row.clone(), dropped_text(self._pipeline.tokenizer, prompt))
        self.num_encoded += len(prompts)

"""A prompt with weights, of any length, as chunks of tokens of the text encoder's length, by AUTOMATIC1111's rules.

Each chunk is encoded by itself, and the chunks' embeddings follow each other. A chunk that is full ends at its last comma, if
that is at most `MAX_WORDS_BACK` tokens back. Weights multiply the embeddings of their tokens, and then the chunk is scaled so
that its mean is what it was.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mii_serve.types import BREAK, FP16, MAX_CHUNKS, PromptEmbeds, parse_a1111

MAX_WORDS_BACK = 20
"""A1111's usual setting ("Prompt word wrap length limit")."""

NUM_READ = 128
"""Prompts whose chunks are kept, for samples that begin with the same text."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens without those that begin and end it, and the weight of each."""

    tokens: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def is_weighted(self) -> bool:
        return any(weight != 1 for weight in self.weights)


@dataclass(frozen=True, slots=True)
class ChunkedPrompt:
    """`dropped` is the text that exceeds `MAX_CHUNKS`."""

    chunks: tuple[Chunk, ...]
    dropped: str = field(default="", repr=False)


class Chunker:
    """Reads prompts for one pipeline."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._tokenizer = pipeline.tokenizer
        self._size = self._tokenizer.model_max_length
        self._comma = self._tokenizer.get_vocab().get(",</w>")
        self.read = functools.lru_cache(NUM_READ)(self._read)
        """The chunks of a text, one at least; its rules were checked before."""

    def tokens(self, chunks: Sequence[Chunk]) -> tuple[torch.Tensor, torch.Tensor]:
        """The input of the text encoder, and its attention mask."""
        tokenizer, size = self._tokenizer, self._size
        ids = torch.full((len(chunks), size), tokenizer.pad_token_id)
        mask = torch.zeros(len(chunks), size, dtype=torch.int64)
        for row, chunk in enumerate(chunks):
            whole = [tokenizer.bos_token_id, *chunk.tokens, tokenizer.eos_token_id]
            ids[row, : len(whole)] = torch.tensor(whole)
            mask[row, : len(whole)] = 1
        return ids, mask

    def _read(self, text: str) -> ChunkedPrompt:
        parts = parse_a1111("prompt", text)
        texts = [self._pipeline.maybe_convert_prompt(part.text, self._tokenizer) for part in parts]
        ids = self._tokenizer(texts, add_special_tokens=False).input_ids if texts else []
        filling = _Filling(self._size - 2, self._comma)
        for part, tokens in zip(parts, ids, strict=True):
            if part is BREAK:
                filling.end_chunk()
            else:
                for token in tokens:
                    filling.add(token, part.weight)
        chunks = filling.finished()
        rest = [token for chunk in chunks[MAX_CHUNKS:] for token in chunk.tokens]
        return ChunkedPrompt(chunks[:MAX_CHUNKS], self._tokenizer.decode(rest).strip() if rest else "")


class _Filling:
    """Chunks as they are filled, token by token."""

    def __init__(self, size: int, comma: int | None) -> None:
        self._size, self._comma = size, comma
        self._chunks: list[Chunk] = []
        self._tokens: list[tuple[int, float]] = []
        self._after_comma = 0

    def add(self, token: int, weight: float) -> None:
        if len(self._tokens) == self._size:
            self._wrap(is_comma=token == self._comma)
        self._tokens.append((token, weight))
        if token == self._comma:
            self._after_comma = len(self._tokens)

    def _wrap(self, *, is_comma: bool) -> None:
        moved: list[tuple[int, float]] = []
        if self._after_comma and not is_comma and len(self._tokens) - self._after_comma < MAX_WORDS_BACK:
            self._tokens, moved = self._tokens[: self._after_comma], self._tokens[self._after_comma :]
        self.end_chunk()
        self._tokens = moved

    def end_chunk(self) -> None:
        self._chunks.append(Chunk(tuple(token for token, _ in self._tokens), tuple(weight for _, weight in self._tokens)))
        self._tokens, self._after_comma = [], 0

    def finished(self) -> tuple[Chunk, ...]:
        if self._tokens or not self._chunks:
            self.end_chunk()
        return tuple(self._chunks)


def weighted(embeds: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """The embeddings of a chunk, tokens × text width, with its weights. Where nothing is weighted they are the same bits."""
    if not chunk.is_weighted:
        return embeds
    weights = embeds.new_ones(len(embeds), dtype=torch.float32)
    weights[1 : 1 + len(chunk.weights)] = torch.tensor(chunk.weights, device=embeds.device)
    plain = embeds.float()
    made = plain * weights[:, None]
    scale = plain.mean() / made.mean()
    return torch.where(scale.isfinite(), made * scale, made).to(embeds.dtype)


def tensor_of(embeds: PromptEmbeds) -> torch.Tensor:
    """Tokens × text width, in float32."""
    dtype = torch.float16 if embeds.dtype == FP16 else torch.float32
    return torch.frombuffer(bytearray(embeds.data), dtype=dtype).view(embeds.num_tokens, embeds.width).float()

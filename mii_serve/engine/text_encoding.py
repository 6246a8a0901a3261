"""What a text encoder makes of tokens, as diffusers' `encode_prompt` reads it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch


def encoded(
    encoder: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, clip_skips: Sequence[int | None]
) -> torch.Tensor:
    """The embeddings of each row of tokens, B × tokens × text width; rows without a `clip_skip` have that of None.

    With `clip_skip` they are the output of the layer as many before the last, after the final layer norm.
    """
    if not any(clip_skips):
        embeds: torch.Tensor = encoder(input_ids, attention_mask=attention_mask)[0]
        return embeds
    outputs = encoder(input_ids, attention_mask=attention_mask, output_hidden_states=True)
    embeds = outputs[0]
    inner = getattr(encoder, "text_model", encoder)  # transformers 5 has no text_model between
    for row, clip_skip in enumerate(clip_skips):
        if clip_skip:
            embeds[row] = inner.final_layer_norm(outputs.hidden_states[-(clip_skip + 1)][row])
    return embeds


@contextlib.contextmanager
def has_text_model(encoder: Any) -> Iterator[None]:
    """While the block runs, there is a `text_model`: diffusers looks in it for the last layer norm, transformers 5 has none."""
    if hasattr(encoder, "text_model"):
        yield
        return
    object.__setattr__(encoder, "text_model", encoder)  # not as a module of its own
    try:
        yield
    finally:
        object.__delattr__(encoder, "text_model")

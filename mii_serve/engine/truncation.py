"""The part of a prompt that its text encoder cuts off."""

from __future__ import annotations

from typing import Any


def dropped_text(pipeline: Any, prompt: str) -> str:
    """The text that does not fit into the text encoder's tokens, found as diffusers finds it; empty where all of it fits."""
    tokenizer = pipeline.tokenizer
    ids = tokenizer(pipeline.maybe_convert_prompt(prompt, tokenizer), padding="longest", return_tensors="pt").input_ids
    if ids.shape[-1] <= tokenizer.model_max_length:
        return ""
    dropped: str = tokenizer.batch_decode(ids[:, tokenizer.model_max_length - 1 : -1])[0]
    return dropped

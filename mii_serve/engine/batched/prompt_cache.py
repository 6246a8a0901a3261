"""The prompt cache: what the kernel set keeps of a prompt, computed once and shared by all samples with the same `PromptKey`.

Texts are encoded in batches of one fixed size: kernels may round differently with the batch size, and the result for a prompt
must not depend on the other texts in its batch.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from mii_serve.engine.batched.loras import BatchedLoras
from mii_serve.engine.kernels import KernelSet
from mii_serve.engine.text_encoding import encoded
from mii_serve.engine.truncation import dropped_text
from mii_serve.engine.upload import upload
from mii_serve.types import LoraParts

CPU_TEXTS, CUDA_TEXTS = 1, 4
"""Texts in a batch; smaller batches are padded to it. A guided sample brings one or two new texts, and on a CPU
padding is not free."""

NUM_SPARE_ROWS = 32
"""Prompts kept beyond those in use; 4 MB each for v1-4 in half precision."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class PromptKey:
    """All that a prompt's embeddings depend on. `clip_skip` is as in diffusers' `encode_prompt`; `loras` are those of the text
    encoder and of the layers behind it.
    """

    text: str = field(repr=False)
    clip_skip: int | None = None
    loras: LoraParts = ()


EMPTY = PromptKey("")
"""The usual negative prompt."""


@dataclass(slots=True, eq=False)
class Prompt:
    """`row` of `PromptCache.projected` holds this prompt while `num_users` is not 0; `dropped` is the part cut off."""

    key: PromptKey
    row: int
    dropped: str = field(repr=False)
    num_users: int = 0


class PromptCache:
    """`projected` is rows × tokens × `KernelSet.prompt_width`, in the UNet's dtype.

    A new prompt replaces the least recently used one that is not in use. The empty prompt is never replaced.
    """

    def __init__(
        self,
        pipeline: Any,
        kernels: KernelSet,
        *,
        max_in_use: int,
        num_spare_rows: int = NUM_SPARE_ROWS,
        loras: BatchedLoras | None = None,
    ) -> None:
        """`max_in_use` is the largest number of different prompts that are in use at once. Only with `loras`, keys have any."""
        num_rows = max_in_use + num_spare_rows
        self._pipeline = pipeline
        self._kernels = kernels
        self._loras = loras
        self._known: OrderedDict[PromptKey, Prompt] = OrderedDict()
        self._free = list(reversed(range(num_rows)))
        self._batch_size = CUDA_TEXTS if torch.device(pipeline.device).type == "cuda" else CPU_TEXTS
        self.num_encoded = 0
        size = num_rows, pipeline.tokenizer.model_max_length, kernels.prompt_width
        self.projected = torch.zeros(size, dtype=pipeline.unet.dtype, device=pipeline.device)

    def acquire(self, keys: Sequence[PromptKey]) -> list[Prompt]:
        """The prompt of each key, in use until it has been released as often as acquired."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._known]
        for key in keys:
            if (known := self._known.get(key)) is not None:
                known.num_users += 1  # before `_encode` looks for rows that are not in use
        for loras in dict.fromkeys(key.loras for key in missing):
            for batch in self._batches([key for key in missing if key.loras == loras]):
                with contextlib.nullcontext() if self._loras is None else self._loras.encoding(loras):
                    self._encode(batch)
        is_new = set(missing)
        for key in keys:
            self._known[key].num_users += key in is_new
            self._known.move_to_end(key)
        return [self._known[key] for key in keys]

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """The text encoder's output, B × tokens × text width."""
        keys = [PromptKey(text) for text in texts]
        return torch.cat([self._embed(batch)[: len(batch)] for batch in self._batches(keys)])

    @contextlib.contextmanager
    def temporary_rows(self, embeds: torch.Tensor) -> Iterator[list[int]]:
        """Rows that hold these embedded prompts, B × tokens × text width, until the block ends."""
        rows = [self._free_row() for _ in embeds]
        try:
            for batch_rows, batch in zip(self._batches(rows), embeds.split(self._batch_size), strict=True):
                padded = torch.cat((batch, batch.new_zeros(self._batch_size - len(batch), *batch.shape[1:])))
                self.projected[batch_rows] = self._project(padded)[: len(batch)]
            yield rows
        finally:
            self._free.extend(rows)

    def release(self, prompts: Iterable[Prompt]) -> None:
        for prompt in prompts:
            prompt.num_users -= 1

    def _encode(self, keys: Sequence[PromptKey]) -> None:
        for key, projected in zip(keys, self._project(self._embed(keys)), strict=False):  # the rest is padding
            row = self._free_row()
            self.projected[row] = projected
            self._known[key] = Prompt(key, row, dropped_text(self._pipeline, key.text))
        self.num_encoded += len(keys)

    def _embed(self, keys: Sequence[PromptKey]) -> torch.Tensor:
        """One batch, padded. Computes what the pipeline's `encode_prompt` does, whose copies would wait for the device."""
        pipeline = self._pipeline
        tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
        texts = [key.text for key in keys] + [""] * (self._batch_size - len(keys))
        length = tokenizer.model_max_length
        texts = pipeline.maybe_convert_prompt(texts, tokenizer)
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        uses_mask = getattr(encoder.config, "use_attention_mask", None)
        device = self.projected.device  # the pipeline takes long to tell its own
        mask = upload(tokens.attention_mask, device) if uses_mask else None
        return encoded(encoder, upload(tokens.input_ids, device), mask, [key.clip_skip for key in keys])

    def _batches(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        return [items[i : i + self._batch_size] for i in range(0, len(items), self._batch_size)]

    def _project(self, embeds: torch.Tensor) -> torch.Tensor:
        return self._kernels.project_prompts(embeds.to(self.projected))

    def _free_row(self) -> int:
        if not self._free:
            idle = next(prompt for prompt in self._known.values() if not prompt.num_users and prompt.key != EMPTY)
            del self._known[idle.key]
            self._free.append(idle.row)
        return self._free.pop()

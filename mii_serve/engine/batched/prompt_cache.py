"""The prompt cache: what the kernel set keeps of a prompt, computed once and shared by all samples with the same `PromptKey`.

Texts are encoded in batches of one fixed size: kernels may round differently with the batch size, and the result for a prompt
must not depend on the other texts in its batch.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from mii_serve.engine.batched.loras import BatchedLoras
from mii_serve.engine.kernels import KernelSet
from mii_serve.engine.prompt_chunks import Chunk, Chunker, tensor_of, weighted
from mii_serve.engine.text_encoding import encoded
from mii_serve.engine.truncation import dropped_text
from mii_serve.engine.upload import upload
from mii_serve.types import PLAIN, GenerationParams, LoraParts, PromptEmbeds

CPU_TEXTS, CUDA_TEXTS = 1, 4
"""Texts in a batch; smaller batches are padded to it. A guided sample brings one or two new texts, and on a CPU
padding is not free."""

NUM_SPARE_ROWS = 32
"""Prompts kept beyond those in use; 4 MB each for v1-4 in half precision."""

NUM_SPARE_CHUNKS = 32
"""Of prompts of several chunks: those kept beyond what is in use."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class PromptKey:
    """All that a prompt's embeddings depend on. `clip_skip` is as in diffusers' `encode_prompt`; `loras` are those of the text
    encoder and of the layers behind it.

    A prompt in A1111's syntax has `num_chunks` chunks of the text encoder's length: its own, and empty ones after them.
    """

    text: str = field(repr=False)
    clip_skip: int | None = None
    loras: LoraParts = ()
    syntax: str = PLAIN
    num_chunks: int = 1
    embeds: PromptEmbeds | None = None

    @property
    def is_plain_text(self) -> bool:
        return self.syntax == PLAIN and self.embeds is None


EMPTY = PromptKey("")
"""The usual negative prompt."""


@dataclass(slots=True, eq=False)
class Prompt:
    """`row` of `PromptCache.projected` holds this prompt while `num_users` is not 0; `dropped` is the part cut off.

    One of several chunks is in no row, but in `chunks`, (chunks × tokens) × `KernelSet.prompt_width`.
    """

    key: PromptKey
    row: int
    dropped: str = field(repr=False)
    chunks: torch.Tensor | None = field(default=None, repr=False)
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
        """`max_in_use` is the largest number of different prompts of one chunk that are in use at once. Only with `loras`, keys
        have any.
        """
        num_rows = max_in_use + num_spare_rows
        self._pipeline = pipeline
        self._kernels = kernels
        self._loras = loras
        self._known: OrderedDict[PromptKey, Prompt] = OrderedDict()
        self._free = list(reversed(range(num_rows)))
        self._batch_size = CUDA_TEXTS if torch.device(pipeline.device).type == "cuda" else CPU_TEXTS
        self._chunker = Chunker(pipeline)
        self.num_encoded = 0
        size = num_rows, pipeline.tokenizer.model_max_length, kernels.prompt_width
        self.projected = torch.zeros(size, dtype=pipeline.unet.dtype, device=pipeline.device)

    def keys_of(self, params: GenerationParams) -> tuple[PromptKey, PromptKey | None]:
        """The keys of a sample's prompt and, with guidance, of its negative prompt, which takes no notice of `clip_skip`."""
        syntax, texts = params.prompt_syntax, [params.prompt]
        if params.is_guided:
            texts.append(params.negative_prompt)
        num_chunks = 1 if syntax == PLAIN else max(len(self._chunker.read(text).chunks) for text in texts)
        of_text = PromptKey("", None, params.lora_choice.parts, syntax, num_chunks)
        key = self._of_embeds(of_text, params.prompt_embeds) or replace(of_text, text=params.prompt, clip_skip=params.clip_skip)
        if not params.is_guided:
            return key, None
        return key, self._of_embeds(of_text, params.negative_prompt_embeds) or replace(of_text, text=params.negative_prompt)

    def _of_embeds(self, key: PromptKey, embeds: PromptEmbeds | None) -> PromptKey | None:
        if embeds is None:
            return None
        return replace(key, num_chunks=embeds.num_tokens // self.projected.shape[1], embeds=embeds)

    def acquire(self, keys: Sequence[PromptKey]) -> list[Prompt]:
        """The prompt of each key, in use until it has been released as often as acquired."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._known]
        for key in keys:
            if (known := self._known.get(key)) is not None:
                known.num_users += 1  # before `_encode` looks for rows that are not in use
        for loras in dict.fromkeys(key.loras for key in missing):
            of_loras = [key for key in missing if key.loras == loras]
            with contextlib.nullcontext() if self._loras is None else self._loras.encoding(loras):
                for batch in self._batches([key for key in of_loras if key.is_plain_text]):
                    self._encode(batch)
                for key in of_loras:
                    if not key.is_plain_text:
                        self._encode_chunks(key)
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
        has_chunks = False
        for prompt in prompts:
            prompt.num_users -= 1
            has_chunks |= prompt.chunks is not None
        if has_chunks:
            self._free_chunks()

    def _encode(self, keys: Sequence[PromptKey]) -> None:
        for key, projected in zip(keys, self._project(self._embed(keys)), strict=False):  # the rest is padding
            row = self._free_row()
            self.projected[row] = projected
            self._known[key] = Prompt(key, row, dropped_text(self._pipeline, key.text))
        self.num_encoded += len(keys)

    def _encode_chunks(self, key: PromptKey) -> None:
        dropped, batches = "", self._given_chunks(key.embeds)
        if key.embeds is None:
            read = self._chunker.read(key.text)
            dropped = read.dropped
            batches = self._read_chunks([*read.chunks, *[Chunk()] * (key.num_chunks - len(read.chunks))], key.clip_skip)
        projected = torch.cat([self._project(batch) for batch in batches])[: key.num_chunks]
        self.num_encoded += 1
        if key.num_chunks > 1:
            self._known[key] = Prompt(key, -1, dropped, projected.flatten(0, 1))
            return
        row = self._free_row()
        self.projected[row] = projected[0]
        self._known[key] = Prompt(key, row, dropped)

    def _read_chunks(self, chunks: Sequence[Chunk], clip_skip: int | None) -> Iterator[torch.Tensor]:
        """The embeddings of chunks in batches, the last one padded."""
        for batch in self._batches(chunks):
            padded = [*batch, *[Chunk()] * (self._batch_size - len(batch))]
            embeds = self._encoded(*self._chunker.tokens(padded), [clip_skip] * len(padded))
            yield torch.stack([weighted(one, chunk) for one, chunk in zip(embeds, padded, strict=True)])

    def _given_chunks(self, embeds: PromptEmbeds | None) -> Iterator[torch.Tensor]:
        """The same of embeddings that a request has brought."""
        if embeds is None:
            return
        chunks = upload(tensor_of(embeds), self.projected.device).to(self.projected.dtype)
        for batch in chunks.view(-1, self.projected.shape[1], embeds.width).split(self._batch_size):
            yield torch.cat((batch, batch.new_zeros(self._batch_size - len(batch), *batch.shape[1:])))

    def _embed(self, keys: Sequence[PromptKey]) -> torch.Tensor:
        """One batch, padded. Computes what the pipeline's `encode_prompt` does, whose copies would wait for the device."""
        pipeline = self._pipeline
        tokenizer = pipeline.tokenizer
        texts = [key.text for key in keys] + [""] * (self._batch_size - len(keys))
        length = tokenizer.model_max_length
        texts = pipeline.maybe_convert_prompt(texts, tokenizer)
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self._encoded(tokens.input_ids, tokens.attention_mask, [key.clip_skip for key in keys])

    def _encoded(self, ids: torch.Tensor, mask: torch.Tensor, clip_skips: Sequence[int | None]) -> torch.Tensor:
        encoder = self._pipeline.text_encoder
        device = self.projected.device  # the pipeline takes long to tell its own
        uses_mask = getattr(encoder.config, "use_attention_mask", None)
        return encoded(encoder, upload(ids, device), upload(mask, device) if uses_mask else None, clip_skips)

    def _batches(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        return [items[i : i + self._batch_size] for i in range(0, len(items), self._batch_size)]

    def _project(self, embeds: torch.Tensor) -> torch.Tensor:
        return self._kernels.project_prompts(embeds.to(self.projected))

    def _free_row(self) -> int:
        if not self._free:
            idle = next(one for one in self._known.values() if not one.num_users and one.chunks is None and one.key != EMPTY)
            del self._known[idle.key]
            self._free.append(idle.row)
        return self._free.pop()

    def _free_chunks(self) -> None:
        """Forget prompts of several chunks that are not in use, those that were longest out of use first."""
        idle = [one for one in self._known.values() if one.chunks is not None and not one.num_users]
        num_chunks = sum(one.key.num_chunks for one in idle)
        for one in idle:
            if num_chunks <= NUM_SPARE_CHUNKS:
                break
            del self._known[one.key]
            num_chunks -= one.key.num_chunks

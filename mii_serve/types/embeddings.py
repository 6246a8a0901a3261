"""Embeddings that a request brings in the place of a text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from mii_serve.errors import InvalidRequestError
from mii_serve.types.limits import ModelParts
from mii_serve.types.prompt_syntax import MAX_CHUNKS

EMBEDS = ("prompt_embeds", "negative_prompt_embeds")
"""The parameters that have them."""

FP32, FP16 = "fp32", "fp16"
BYTES_OF = {FP32: 4, FP16: 2}
_NOT_FINITE = {FP32: re.compile(rb"[\x7f\xff]"), FP16: re.compile(rb"[\x7c-\x7f\xfc-\xff]")}
"""The highest byte of a number that is not finite, or in float32 one beyond 1.7e38."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEmbeds:
    """`num_tokens` × `width` numbers of the `dtype`, "fp32" or "fp16", row by row, the lowest byte first."""

    num_tokens: int
    width: int
    dtype: str
    data: bytes = field(repr=False)

    def checked(self, name: str, parts: ModelParts) -> PromptEmbeds:
        """Raises:
        InvalidRequestError: they are none that this model takes.
        """
        size, most = parts.num_text_tokens, MAX_CHUNKS * parts.num_text_tokens
        if self.dtype not in BYTES_OF:
            raise InvalidRequestError(name, f"must be of a dtype among {', '.join(BYTES_OF)}", repr(self.dtype[:20]))
        if self.width != parts.text_width:
            raise InvalidRequestError(name, f"must be {parts.text_width} wide, as the model's text encoder", str(self.width))
        if not size <= self.num_tokens <= most or self.num_tokens % size:
            raise InvalidRequestError(name, f"must have a multiple of {size} tokens, at most {most}", str(self.num_tokens))
        if len(self.data) != (expected := self.num_tokens * self.width * BYTES_OF[self.dtype]):
            raise InvalidRequestError(name, f"must have {expected} bytes of data", str(len(self.data)))
        if _NOT_FINITE[self.dtype].search(self.data[BYTES_OF[self.dtype] - 1 :: BYTES_OF[self.dtype]]):
            raise InvalidRequestError(name, "must be finite numbers")
        return self

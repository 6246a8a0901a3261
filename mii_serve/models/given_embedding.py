"""Embeddings of textual inversion (`--embedding TOKEN=PATH`): words of prompts that mean what a file says.

As with diffusers' `load_textual_inversion`, a token of several vectors stands for as many tokens: `TOKEN`, `TOKEN_1`, and on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mii_serve.errors import ModelError
from mii_serve.models.hints import EMBEDDING_FILES
from mii_serve.models.single_file.contents import is_embedding, what_else
from mii_serve.models.single_file.files import ENDINGS, WeightsFile, read_file

_NAMES = ("emb_params", "string_to_param.*")


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenEmbedding:
    """The token, and the file of its vectors."""

    token: str
    file: WeightsFile

    def vectors(self) -> torch.Tensor:
        """N × text width, in float32 on the CPU."""
        name = next((name for name in _NAMES if name in self.file.shapes), next(iter(self.file.shapes)))
        with self.file.opened() as content:
            tensor: torch.Tensor = content.get_tensor(name).detach()
        return tensor.to(torch.float32).reshape(-1, tensor.shape[-1])

    def add_to(self, pipeline: Any) -> None:
        """Add the token to the pipeline's tokenizer and its vectors to the text encoder.

        Raises:
            ModelError: the vectors are of another model, or the token is a word already.
        """
        tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
        vectors, width = self.vectors(), encoder.config.hidden_size
        if vectors.shape[1] != width:
            raise ModelError(
                f"embedding: {self.file.path} has vectors of {vectors.shape[1]} numbers, and the model's text encoder takes"
                f" {width}. It was made for another model"
            )
        names = [self.token, *(f"{self.token}_{number}" for number in range(1, len(vectors)))]
        added = tokenizer.get_added_vocab()
        for name in names:
            if name in tokenizer.get_vocab() and (name not in added or name in tokenizer.all_special_tokens):
                raise ModelError(f"embedding: {name!r} is a token of the model already. Choose another, such as <{name}>")
        tokenizer.add_tokens([name for name in names if name not in added])
        if len(tokenizer) > encoder.get_input_embeddings().num_embeddings:
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False).requires_grad_(False)
        table = encoder.get_input_embeddings().weight
        table[tokenizer.convert_tokens_to_ids(names)] = vectors.to(table)


def find_embedding(token: str, path: Path, *, allow_pickle: bool) -> GivenEmbedding:
    """
    Raises:
        ModelError: it is no embedding that can be used.
    """
    path = path.expanduser().absolute()
    if path.is_dir():
        names = [name for name in EMBEDDING_FILES if (path / name).is_file()]
        if not names:
            raise ModelError(f"embedding: {path} holds no {' and no '.join(EMBEDDING_FILES)}. Give the embedding's file")
        path = path / names[0]
    if not path.is_file() or path.suffix not in ENDINGS:
        raise ModelError(f"embedding: {path} is not a file of weights ({', '.join(ENDINGS)})")
    file = read_file(path, allow_pickle=allow_pickle)
    if "clip_g" in file.shapes:
        raise ModelError(f"embedding: {path} is of Stable Diffusion XL, which has two text encoders")
    if not is_embedding(file.shapes):
        raise ModelError(f"embedding: {path} is {what_else(file.shapes) or 'no embedding'}")
    return GivenEmbedding(token=token, file=file)

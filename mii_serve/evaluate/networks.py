"""The networks that look at pictures: the model's own safety checker, a CLIP, and the Inception network of FID. Imports torch.

Each turns a group of pictures into features, one row for each. What a network is given, and its weights, decide the figures, so
each says what it is and has a digest of its files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from mii_serve.errors import InvalidRequestError
from mii_serve.models.quiet import quiet_libraries

Features = npt.NDArray[np.float32]
INCEPTION_DIMENSIONS = 2048


class Network(Protocol):
    @property
    def name(self) -> str:
        """What it is, as part of a file's name."""

    @property
    def digest(self) -> str:
        """Of its files, in hex."""

    def features(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Features:
        """One row for each picture."""


class SafetyCheckerSpace:
    """The image embedding of a model's safety checker, which is CLIP's: projected, not normalized."""

    name = "safety_clip"

    def __init__(self, model: str, device: str) -> None:
        """Raises:
        ModelError: the model is not there, or has no safety checker.
        """
        with quiet_libraries():
            from mii_serve.models.image_checker import load_image_checker

        self._checker = load_image_checker(model, device=device)
        self._device = device
        self.digest = self._checker.revision.removeprefix("sha256:")
        self.source = f"{self._checker.model} {self._checker.revision}"

    @torch.inference_mode()
    def features(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Features:
        with quiet_libraries():
            given = self._checker.feature_extractor(list(pictures), return_tensors="pt").pixel_values.to(self._device)
        pooled = self._checker.safety_checker.vision_model(given)[1]
        return _on_host(self._checker.safety_checker.visual_projection(pooled))


class ClipScores:
    """100 times the cosine between CLIP's embeddings of a picture and its prompt, at least 0: one number a picture."""

    name = "clip_score"

    def __init__(self, folder: Path, device: str) -> None:
        """Raises:
        InvalidRequestError: there is no CLIP in the folder.
        """
        try:
            with quiet_libraries():
                from transformers import CLIPModel, CLIPProcessor

                self._model: Any = CLIPModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
                self._processor: Any = CLIPProcessor.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise InvalidRequestError("--clip", f"{folder} is no folder of a CLIPModel with safetensors: {error}") from error
        self._model = self._model.to(device).eval()
        self._device = device
        self.digest = _digest(*sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json")))
        self.source = f"{folder.name} sha256:{self.digest[:12]}"

    @torch.inference_mode()
    def features(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Features:
        with quiet_libraries():
            given = self._processor(
                text=list(prompts), images=list(pictures), return_tensors="pt", padding=True, truncation=True
            )
        found = self._model(**given.to(self._device))
        return _on_host(100 * (found.image_embeds * found.text_embeds).sum(-1, keepdim=True).clamp(min=0))


class Inception:
    """The network of FID as one TorchScript file, `inception-2015-12-05.pt`, which does its own scaling."""

    name = "inception"

    def __init__(self, file: Path, device: str) -> None:
        """Raises:
        InvalidRequestError: the file is not that network.
        """
        try:
            with quiet_libraries():
                self._network: Any = torch.jit.load(str(file), map_location=device)
        except (OSError, RuntimeError, ValueError) as error:
            text = str(error).strip().partition("\n")[0][:200]
            raise InvalidRequestError("--inception", f"{file} is no TorchScript file: {text}") from error
        self._network.eval()
        self._device = device
        self.digest = _digest(file)
        self.source = f"{file.name} sha256:{self.digest[:12]}"
        found = self.features([Image.new("RGB", (64, 64))], [""])
        if found.shape != (1, INCEPTION_DIMENSIONS):
            raise InvalidRequestError("--inception", f"gives features of shape {found.shape}; FID's have 2048 dimensions")

    @torch.inference_mode()
    def features(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Features:
        groups: dict[tuple[int, int], list[int]] = {}
        for number, picture in enumerate(pictures):
            groups.setdefault(picture.size, []).append(number)
        rows: list[Features | None] = [None] * len(pictures)
        for numbers in groups.values():
            pixels = np.stack([np.asarray(pictures[number]) for number in numbers]).transpose(0, 3, 1, 2)
            try:
                found = _on_host(self._network(torch.from_numpy(pixels.copy()).to(self._device), return_features=True))
            except (RuntimeError, TypeError) as error:
                text = str(error).strip().partition("\n")[0][:200]
                raise InvalidRequestError("--inception", f"does not take pictures as FID's network does: {text}") from error
            for number, row in zip(numbers, found, strict=True):
                rows[number] = row
        return np.stack([row for row in rows if row is not None])


def chosen_device(asked: str) -> str:
    """`auto` is a GPU where there is one."""
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def _on_host(found: torch.Tensor) -> Features:
    values: Features = found.float().cpu().numpy()
    return values


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name}\0".encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()

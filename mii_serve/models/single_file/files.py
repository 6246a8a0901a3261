"""Reads a file of weights: the names and shapes of its tensors first, the tensors when they are asked for.

Safetensors are read by their header. A pickle (`.ckpt`, `.pt`, `.bin`) is refused unless the operator allows it, and then read
by PyTorch's unpickler for weights, which builds tensors and plain containers and runs no code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mii_serve.errors import ModelError
from mii_serve.models.single_file.contents import Shapes
from mii_serve.models.weights import check_not_a_pointer, read_header

SAFETENSORS = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
ENDINGS = (SAFETENSORS, *PICKLES)
"""Of the files that may be a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFile:
    """`tensors` of a pickle, which has to be read for their shapes; None for safetensors."""

    path: Path
    shapes: Shapes
    metadata: Mapping[str, str]
    tensors: Mapping[str, Any] | None = None

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """Within it, the result gives a tensor by its name (`get_tensor`)."""
        if self.tensors is not None:
            yield _Unpickled(self.tensors)
            return
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as content:
            yield content


@dataclass(frozen=True, slots=True)
class _Unpickled:
    tensors: Mapping[str, Any]

    def get_tensor(self, name: str) -> Any:
        return self.tensors[name]


def read_file(path: Path, *, allow_pickle: bool) -> WeightsFile:
    """
    Raises:
        ModelError: it cannot be read, or is a pickle that is not allowed.
    """
    check_not_a_pointer(path)
    if path.suffix == SAFETENSORS:
        header = read_header(path)
        metadata = header.pop("__metadata__", {})
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        return WeightsFile(path=path, shapes=shapes, metadata=metadata)
    if not allow_pickle:
        raise ModelError(
            f"{path} is a pickle, which can run code when it is read. Use the model's .safetensors file, or convert it once"
            " where that is safe. Or, if you trust its source, set allow_pickle (--allow-pickle, MII_SERVE_ALLOW_PICKLE=true);"
            " it is then read without running code"
        )
    tensors = unpickled(path)
    return WeightsFile(path=path, shapes={name: tuple(t.shape) for name, t in tensors.items()}, metadata={}, tensors=tensors)


def unpickled(path: Path) -> dict[str, Any]:
    """The tensors of a pickle by name, those of containers inside by their path, without the usual outer `state_dict`.

    Raises:
        ModelError
    """
    import torch

    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file of before 2020, which cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ModelError(
            f"{path} cannot be read without running code: {reason}. Convert it to safetensors where its code may run"
        ) from error
    while isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    return dict(_tensors(content, "")) if isinstance(content, dict) else {}


def _tensors(content: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{name}.")

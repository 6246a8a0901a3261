"""Which weight files a part is loaded from, and whether they are intact. Reads names and headers, never tensors.

Safetensors are preferred to pickles (`.bin`), which are only used where the operator allows them. A half-precision variant
(`*.fp16.*`) is preferred for fp16 and is a last resort for the other precisions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mii_serve.errors import ModelError

if TYPE_CHECKING:
    from mii_serve.models import Precision

SAFETY_CHECKER = "safety_checker"
MODEL_PARTS = ("unet", "vae", "text_encoder", SAFETY_CHECKER)
"""The parts that have weights."""

_DIFFUSERS_PARTS = ("unet", "vae")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_PICKLE_ENDINGS = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way a part's weights may be stored: a single file, or shards listed in an index."""

    stem: str
    ending: str
    variant: str | None

    @property
    def is_pickle(self) -> bool:
        return self.ending == "bin"

    @property
    def file(self) -> str:
        return f"{self._stem_and_variant}.{self.ending}"

    @property
    def index(self) -> str:
        return f"{self.stem}.{self.ending}.index{f'.{self.variant}' if self.variant else ''}.json"

    @property
    def shards(self) -> str:
        """A pattern, for asking the hub."""
        return f"{self._stem_and_variant}-*-of-*.{self.ending}"

    @property
    def _stem_and_variant(self) -> str:
        return f"{self.stem}.{self.variant}" if self.variant else self.stem


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """`index` says which tensor is in which of the `files`, where there are several."""

    files: tuple[Path, ...]
    variant: str | None
    is_pickle: bool
    index: Path | None = None

    @property
    def all_files(self) -> tuple[Path, ...]:
        return self.files if self.index is None else (*self.files, self.index)


def candidates(part: str, dtype: Precision, *, allow_pickle: bool) -> tuple[Candidate, ...]:
    """How the part's weights may be stored, best first.

    A safety checker may always be a pickle, since many models have no other and to serve them without it is worse. It is read
    without running code, as all pickles are.
    """
    variants = ("fp16", None) if dtype == "fp16" else (None, "fp16")
    is_diffusers = part in _DIFFUSERS_PARTS
    stems = {
        "safetensors": "diffusion_pytorch_model" if is_diffusers else "model",
        "bin": "diffusion_pytorch_model" if is_diffusers else "pytorch_model",
    }
    endings = ("safetensors", "bin") if allow_pickle or part == SAFETY_CHECKER else ("safetensors",)
    return tuple(Candidate(stems[ending], ending, variant) for ending in endings for variant in variants)


def find_weights(folder: Path, part: str, dtype: Precision, *, allow_pickle: bool) -> Weights:
    """Choose the part's weight files in `folder`, and check that they are intact.

    Raises:
        ModelError
    """
    for candidate in candidates(part, dtype, allow_pickle=allow_pickle):
        files = _files(folder, candidate)
        if files:
            for file in files:
                check_not_a_pointer(file)
                if not candidate.is_pickle:
                    read_header(file)
            index = None if files == (folder / candidate.file,) else folder / candidate.index
            return Weights(files=files, variant=candidate.variant, is_pickle=candidate.is_pickle, index=index)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_ENDINGS)
    if pickles and not allow_pickle:
        raise ModelError(
            f"{part}: {folder} has its weights only as pickles ({', '.join(pickles)}), which can run code when they are"
            " read. Convert them once, where that is safe: StableDiffusionPipeline.from_pretrained(FOLDER)"
            ".save_pretrained(NEW_FOLDER). Or, if you trust their source, set allow_pickle"
            " (MII_SERVE_ALLOW_PICKLE=true); they are then read without running code"
        )
    wanted = " or ".join(candidate.file for candidate in candidates(part, dtype, allow_pickle=allow_pickle))
    raise ModelError(f"{part}: {folder} has no weights: expected {wanted}. {_FETCH_AGAIN}")


_FETCH_AGAIN = "Fetch or copy the model again"


def check_not_a_pointer(file: Path) -> None:
    """Refuse the small text file that git leaves in a big file's place where git-lfs is not installed.

    Raises:
        ModelError
    """
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelError(
                f"{file} is a git-lfs pointer, not the file itself. Run `git lfs install && git lfs pull` in the clone, or"
                " fetch the model with `hf download`"
            )


def _files(folder: Path, candidate: Candidate) -> tuple[Path, ...]:
    """The candidate's files, or none where it is not what the folder holds."""
    single = folder / candidate.file
    if single.is_file():
        return (single,)
    index = folder / candidate.index
    if not index.is_file():
        return ()
    check_not_a_pointer(index)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not an index of weight files: {error}. {_FETCH_AGAIN}") from error
    if not names:
        raise ModelError(f"{index} names no weight files. {_FETCH_AGAIN}")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index} names {name!r}, which is not a file beside it. {_FETCH_AGAIN}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{index} names weight files that are not there: {', '.join(missing)}. {_FETCH_AGAIN}")
    return tuple(folder / name for name in names)


def read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, which is as long as its header implies: eight bytes of header length, the header, the
    tensors.

    Raises:
        ModelError
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_size > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelError(f"{file} is cut short, or not a safetensors file ({size} bytes). {_FETCH_AGAIN}")
        content = stream.read(header_size)
    try:
        header: dict[str, Any] = json.loads(content)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        expected = 8 + header_size + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        are_shapes = all(isinstance(size, int) for entry in tensors.values() for size in entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{file} is not a safetensors file: its header cannot be read. {_FETCH_AGAIN}") from error
    if not are_shapes:
        raise ModelError(f"{file} is not a safetensors file: its header cannot be read. {_FETCH_AGAIN}")
    if size != expected:
        raise ModelError(f"{file} is damaged: it has {size} bytes, its header says {expected}. {_FETCH_AGAIN}")
    return header

"""What a network sees in many pictures, kept on disk in blocks: an evaluation that goes on computes only what is new."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from mii_serve.errors import InvalidRequestError
from mii_serve.evaluate.networks import Features, Network

BLOCK, GROUP = 1024, 16
"""Pictures of one file, and those that the network sees at once."""
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


@dataclass(frozen=True, slots=True)
class Item:
    """A picture, its prompt, and the SHA-256 of its file."""

    path: Path
    sha256: str
    prompt: str = ""


def features_of(
    items: Sequence[Item], network: Network, folder: Path, on_progress: Callable[[int], None] = lambda _: None
) -> Features:
    """One row for each picture; what `folder` has of them is not computed again. `on_progress` hears how many are there."""
    place = folder / f"{network.name}-{network.digest[:12]}"
    place.mkdir(parents=True, exist_ok=True)
    blocks = []
    for start in range(0, len(items), BLOCK):
        block = items[start : start + BLOCK]
        keys = np.array([hashlib.sha256(f"{one.sha256} {one.prompt}".encode()).hexdigest() for one in block])
        file = place / f"{start // BLOCK:05d}.npz"
        if (found := _kept(file, keys)) is None:
            found = _computed(block, network)
            half = file.with_suffix(".part")
            with half.open("wb") as written:
                np.savez(written, keys=keys, features=found)
            half.replace(file)
        blocks.append(found)
        on_progress(start + len(block))
    return np.concatenate(blocks)


def _kept(file: Path, keys: np.ndarray) -> Features | None:
    try:
        with np.load(file, allow_pickle=False) as kept:
            if not np.array_equal(kept["keys"], keys):
                return None
            found: Features = kept["features"]
            return found if len(found) == len(keys) else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _computed(items: Sequence[Item], network: Network) -> Features:
    groups = []
    for start in range(0, len(items), GROUP):
        group = items[start : start + GROUP]
        pictures = [_opened(item.path) for item in group]
        groups.append(network.features(pictures, [item.prompt for item in group]))
    return np.concatenate(groups)


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def folder_items(folder: Path, option: str) -> list[Item]:
    """All pictures below a folder, by name.

    Raises:
        InvalidRequestError: there are fewer than two, or a file of a picture's suffix is none.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(paths) < 2:
        raise InvalidRequestError(option, f"{folder} must have two pictures at least ({', '.join(sorted(SUFFIXES))})")
    items = []
    for path in paths:
        content = path.read_bytes()
        try:
            with Image.open(path) as picture:
                picture.verify()
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise InvalidRequestError(option, f"{path} is no picture: {error}") from error
        items.append(Item(path, hashlib.sha256(content).hexdigest()))
    return items

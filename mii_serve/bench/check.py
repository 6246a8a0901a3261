"""Holds a sample of the pictures against the FP32 reference engine, made here from the same request: a fast wrong server must
not win.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mii_serve.bench.values import Answer, PlannedRequest, Record, Shown
from mii_serve.config import DeployConfig
from mii_serve.errors import MiiServeError
from mii_serve.types import MAX_SEED, GenerationRequest, ImageFormat, OutputOptions

FP32_MAX_LEVELS = 1
"""In float32 engines differ by the order of their operations only: one level of 255 in any pixel."""
HALF_MIN_PSNR_DB = 30.0
"""For half precision, where single pixels may differ more; not yet measured on a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """A picture passes when no pixel is further off than `max_levels`, or, where that is given, when it is as near as
    `min_psnr_db`.
    """

    max_levels: int = FP32_MAX_LEVELS
    min_psnr_db: float | None = None

    @classmethod
    def of(cls, dtype: str | None) -> Tolerance:
        """What is to be expected of an engine in this precision; of an unknown one, as much as of FP32."""
        return cls(min_psnr_db=HALF_MIN_PSNR_DB if dtype in ("fp16", "bf16") else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A picture of the sample: image `image_index` of a request."""

    request: PlannedRequest
    image_index: int
    picture: Shown


class Sampler:
    """Keeps a few pictures of each kind of request, each answered one with the same chance, however many come."""

    def __init__(self, size: int, num_kinds: int, seed: str) -> None:
        self._per_kind = -(-size // num_kinds) if size else 0
        self._chance = random.Random(f"{seed}/sample")
        self._num_seen: dict[str, int] = {}
        self._kept: dict[str, list[Kept]] = {}

    def __call__(self, request: PlannedRequest, answer: Answer, record: Record) -> None:
        """An `OnAnswer` of a load."""
        if not record.is_ok or not self._per_kind:
            return
        seen = self._num_seen[request.kind] = self._num_seen.get(request.kind, 0) + 1
        kept = self._kept.setdefault(request.kind, [])
        image_index = self._chance.randrange(request.num_images)
        one = Kept(request=request, image_index=image_index, picture=answer.pictures[image_index])
        if len(kept) < self._per_kind:
            kept.append(one)
        elif (place := self._chance.randrange(seen)) < self._per_kind:
            kept[place] = one

    @property
    def kept(self) -> list[Kept]:
        return [one for kind in self._kept.values() for one in kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One picture beside the reference's."""

    index: int
    kind: str
    image_index: int
    max_levels: int | None
    psnr_db: float | None
    is_ok: bool
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the check found; without pictures it has found nothing, and `is_ok` is None."""

    tolerance: Tolerance
    reference: str
    pictures: tuple[Compared, ...] = field(default=())
    text: str = ""

    @property
    def is_ok(self) -> bool | None:
        return all(one.is_ok for one in self.pictures) if self.pictures else None


class Reference(Protocol):
    """Makes pictures to compare with."""

    @property
    def name(self) -> str: ...

    def picture(self, request: PlannedRequest, image_index: int) -> Image.Image: ...


class LocalReference:
    """The reference engine, loaded in this process."""

    def __init__(self, local: Any, model: str) -> None:
        self._local, self.name = local, f"reference engine, {model}"

    def picture(self, request: PlannedRequest, image_index: int) -> Image.Image:
        """The picture as the reference makes it.

        Raises:
            MiiServeError: it cannot be made.
        """
        # Image i of a request is the picture of seed + i; the others need not be made.
        seed = ((request.asked.seed or 0) + image_index) & MAX_SEED
        asked = replace(request.asked, seed=seed, num_images_per_prompt=1)
        output = OutputOptions(format=ImageFormat.RAW_RGB)
        answer = self._local.generate(GenerationRequest(params=asked, output=output))
        done, image = answer.parameters, answer.images[0]
        self.name = f"{done.engine} {done.dtype}, {done.model_revision}"
        return Image.frombytes("RGB", (image.width, image.height), image.encoded)


@contextmanager
def open_reference(model: str) -> Iterator[LocalReference]:
    """Load the model here, for as long as the block runs.

    Raises:
        ConfigError, ModelError: it cannot be loaded.
    """
    from mii_serve.replica.local import open_local

    with open_local(DeployConfig.load({"model": model, "engine": "reference", "dtype": "fp32", "max_slots": 1})) as local:
        yield LocalReference(local, model)


def check(
    kept: list[Kept], reference: Reference, tolerance: Tolerance, on_checked: Callable[[], None] = lambda: None
) -> Verdict:
    """Compare each picture; one that the reference refuses to make is one that the server should not have made."""
    compared = []
    for one in kept:
        compared.append(_compare(one, reference, tolerance))
        on_checked()
    return Verdict(tolerance=tolerance, reference=reference.name, pictures=tuple(compared))


def _compare(kept: Kept, reference: Reference, tolerance: Tolerance) -> Compared:
    text, levels, psnr_db = "", None, None
    try:
        levels, psnr_db = distance(kept.picture.open(), reference.picture(kept.request, kept.image_index))
    except (MiiServeError, OSError, ValueError, SyntaxError) as error:
        text = str(error)
    is_near = tolerance.min_psnr_db is not None and psnr_db is not None and psnr_db >= tolerance.min_psnr_db
    return Compared(
        index=kept.request.index,
        kind=kept.request.kind,
        image_index=kept.image_index,
        max_levels=levels,
        psnr_db=psnr_db,
        is_ok=levels is not None and (levels <= tolerance.max_levels or is_near),
        text=text,
    )


def distance(one: Image.Image, other: Image.Image) -> tuple[int, float]:
    """The largest difference of any pixel in levels of 255, and the peak signal-to-noise ratio in dB (infinite for the same).

    Raises:
        ValueError: their sizes differ.
    """
    if one.size != other.size:
        raise ValueError(f"it is {one.width}x{one.height}, the reference's {other.width}x{other.height}")
    gap = np.asarray(one.convert("RGB"), np.float64) - np.asarray(other.convert("RGB"), np.float64)
    mean_square = float(np.mean(gap**2))
    psnr_db = math.inf if mean_square == 0 else 10 * math.log10(255**2 / mean_square)
    return int(np.abs(gap).max()), psnr_db

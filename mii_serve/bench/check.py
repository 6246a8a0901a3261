"""Compares a sample of the pictures with those that the FP32 reference engine makes, in this process, from the same requests.

The reference needs the server's packages (torch, diffusers); they are imported by `open_reference`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from PIL import Image

from mii_serve.bench.values import Answer, PlannedRequest, ReceivedPicture, Record
from mii_serve.errors import MiiServeError
from mii_serve.types import MAX_SEED, GenerationRequest, ImageFormat, OutputOptions

FP32_MAX_LEVELS = 1
"""Levels of 255. In float32, engines differ only in the order of operations, which moves a pixel by one level."""
HALF_MIN_PSNR_DB = 30.0
"""For half precision, where single pixels may differ by more; an estimate, not yet measured on a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """A picture passes if no pixel differs by more than `max_levels` of 255, or if its PSNR is at least `min_psnr_db`, where
    that is given.
    """

    max_levels: int = FP32_MAX_LEVELS
    min_psnr_db: float | None = None

    @classmethod
    def of(cls, dtype: str | None) -> Tolerance:
        """The tolerance for an engine of this precision; an unknown precision gets that of FP32."""
        return cls(min_psnr_db=HALF_MIN_PSNR_DB if dtype in ("fp16", "bf16") else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledPicture:
    """A picture to check: image `image_index` of a request."""

    request: PlannedRequest
    image_index: int
    picture: ReceivedPicture


class PictureSample:
    """A random sample of the pictures, of equal size for each kind of request (reservoir sampling: every answered request of a
    kind is in it with the same probability, however many there are).
    """

    def __init__(self, size: int, num_kinds: int, seed: str) -> None:
        self._per_kind = -(-size // num_kinds) if size else 0
        self._rng = random.Random(f"{seed}/sample")
        self._num_seen: dict[str, int] = {}
        self._pictures: dict[str, list[SampledPicture]] = {}

    def __call__(self, request: PlannedRequest, answer: Answer, record: Record) -> None:
        """Offer the pictures of an answer; this is an `OnAnswer` of the load."""
        if not record.is_ok or not self._per_kind:
            return
        seen = self._num_seen[request.kind] = self._num_seen.get(request.kind, 0) + 1
        pictures = self._pictures.setdefault(request.kind, [])
        image_index = self._rng.randrange(request.num_images)
        picture = SampledPicture(request=request, image_index=image_index, picture=answer.pictures[image_index])
        if len(pictures) < self._per_kind:
            pictures.append(picture)
        elif (place := self._rng.randrange(seen)) < self._per_kind:
            pictures[place] = picture

    @property
    def pictures(self) -> list[SampledPicture]:
        return [picture for kind in self._pictures.values() for picture in kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedPicture:
    """The comparison of one picture with the reference's: the largest difference of a pixel in levels of 255, and the PSNR in
    dB. Both are None, and `text` says why, where the pictures could not be compared.
    """

    index: int
    kind: str
    image_index: int
    max_levels: int | None
    psnr_db: float | None
    is_ok: bool
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureCheck:
    """The result of the check. `is_ok` is None if no picture was checked; `text` then says why."""

    tolerance: Tolerance
    reference: str
    pictures: tuple[ComparedPicture, ...] = ()
    text: str = ""

    @property
    def is_ok(self) -> bool | None:
        return all(one.is_ok for one in self.pictures) if self.pictures else None


class Reference(Protocol):
    """What makes the pictures to compare with."""

    @property
    def name(self) -> str: ...

    def picture(self, request: PlannedRequest, image_index: int) -> Image.Image: ...


class LocalReference:
    """The reference engine, loaded in this process."""

    def __init__(self, local: Any, model: str) -> None:
        self._local, self.name = local, f"reference engine, {model}"

    def picture(self, request: PlannedRequest, image_index: int) -> Image.Image:
        """Image `image_index` of the request.

        Raises:
            MiiServeError: the reference refuses the request, or fails.
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
    """Load the model in this process, for as long as the block runs.

    Raises:
        ConfigError, ModelError: it cannot be loaded.
        ModuleNotFoundError: the server's packages are not installed.
    """
    from mii_serve.config import DeployConfig
    from mii_serve.replica.local import open_local

    with open_local(DeployConfig.load({"model": model, "engine": "reference", "dtype": "fp32", "max_slots": 1})) as local:
        yield LocalReference(local, model)


def check(sampled: list[SampledPicture], reference: Reference, tolerance: Tolerance) -> PictureCheck:
    """Compare each picture. A request that the reference refuses fails the check: the server should have refused it, too."""
    compared = tuple(_compare(picture, reference, tolerance) for picture in sampled)
    return PictureCheck(tolerance=tolerance, reference=reference.name, pictures=compared)


def _compare(sampled: SampledPicture, reference: Reference, tolerance: Tolerance) -> ComparedPicture:
    text, levels, psnr_db = "", None, None
    try:
        levels, psnr_db = distance(sampled.picture.open(), reference.picture(sampled.request, sampled.image_index))
    except (MiiServeError, OSError, ValueError, SyntaxError) as error:
        text = str(error)
    is_near = tolerance.min_psnr_db is not None and psnr_db is not None and psnr_db >= tolerance.min_psnr_db
    return ComparedPicture(
        index=sampled.request.index,
        kind=sampled.request.kind,
        image_index=sampled.image_index,
        max_levels=levels,
        psnr_db=psnr_db,
        is_ok=levels is not None and (levels <= tolerance.max_levels or is_near),
        text=text,
    )


def distance(one: Image.Image, other: Image.Image) -> tuple[int, float]:
    """The largest difference of any pixel in levels of 255, and the peak signal-to-noise ratio in dB (infinite if equal).

    Raises:
        ValueError: their sizes differ.
    """
    import numpy as np

    if one.size != other.size:
        raise ValueError(f"it is {one.width}x{one.height}, the reference's {other.width}x{other.height}")
    gap = np.asarray(one.convert("RGB"), np.float64) - np.asarray(other.convert("RGB"), np.float64)
    mean_square = float(np.mean(gap**2))
    psnr_db = math.inf if mean_square == 0 else 10 * math.log10(255**2 / mean_square)
    return int(np.abs(gap).max()), psnr_db

"""How far from the FP32 reference an output may be, for each stage and precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from types import MappingProxyType

from mii_serve.errors import ConfigError
from mii_serve.types import EngineDescription
from mii_serve.verify.compare import Difference


class Stage(StrEnum):
    """A stage of image generation, in the order in which a request passes them.

    The first check is whether the reference itself is diffusers' pipeline; the last are whole pictures.
    """

    PIPELINE = "pipeline"
    TEXT_ENCODER = "text encoder"
    UNET = "unet"
    VAE = "vae"
    PICTURES = "pictures"


LEAST = frozenset({"psnr_db", "ssim"})
"""Figures that are the better the larger they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The most of each figure of `Difference`, or the least of those in `LEAST`; None does not bind."""

    max: float | None = None
    mean: float | None = None
    relative_max: float | None = None
    relative_rms: float | None = None
    psnr_db: float | None = None
    ssim: float | None = None

    def __str__(self) -> str:
        return ", ".join(f"{name} {_word(name)} {bound:g}" for name, bound in self._set())

    def broken_by(self, difference: Difference) -> list[str]:
        """A sentence for each bound that is not kept. What is not a number keeps none."""
        broken = []
        for name, bound in self._set():
            figure = getattr(difference, name)
            if figure is None or not (figure >= bound if name in LEAST else figure <= bound):
                got = "not known" if figure is None else f"{figure:.3g}"
                broken.append(f"{name} is {got}, {_word(name)} {bound:g} is allowed")
        return broken

    def _set(self) -> list[tuple[str, float]]:
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return [(name, bound) for name, bound in named if bound is not None]


def _word(name: str) -> str:
    return "at least" if name in LEAST else "at most"


THE_SAME = Bounds(max=0.0)
"""The reference computes what the pipeline computes, operation by operation, whatever the engine's precision is."""

LIMITS: Mapping[str, Mapping[Stage, Bounds]] = MappingProxyType(
    {
        # Rounding in another order: 3e-6 measured for the built-in UNet, 1e-5 for one of v1-4's size with random weights.
        "fp32": {
            Stage.PIPELINE: THE_SAME,
            Stage.TEXT_ENCODER: Bounds(relative_max=5e-5, relative_rms=2e-5),
            Stage.UNET: Bounds(relative_max=1e-4, relative_rms=5e-5),
            Stage.VAE: Bounds(max=0.05),
            Stage.PICTURES: Bounds(max=1.0),
        },
        # About three times what was measured for the built-in model: room for other models and other kernels.
        "fp16": {
            Stage.PIPELINE: THE_SAME,
            Stage.TEXT_ENCODER: Bounds(relative_rms=0.0025),
            Stage.UNET: Bounds(relative_rms=0.01),
            Stage.VAE: Bounds(psnr_db=60.0),
            Stage.PICTURES: Bounds(psnr_db=35.0, ssim=0.98),
        },
        "bf16": {
            Stage.PIPELINE: THE_SAME,
            Stage.TEXT_ENCODER: Bounds(relative_rms=0.025),
            Stage.UNET: Bounds(relative_rms=0.06),
            Stage.VAE: Bounds(psnr_db=45.0),
            Stage.PICTURES: Bounds(psnr_db=25.0, ssim=0.95),
        },
    }
)
"""What each was set by is in docs/architecture/08-verify.md."""


def limits_for(dtype: str) -> Mapping[Stage, Bounds]:
    """The limits of a precision.

    Raises:
        ConfigError: there are none.
    """
    if dtype not in LIMITS:
        raise ConfigError("dtype", f"there are limits for {', '.join(LIMITS)}, none for {dtype!r}")
    return LIMITS[dtype]


def where_measured(description: EngineDescription) -> str:
    """What the limits were measured on, for every report."""
    measured = "measured with the built-in model on a CPU"
    return f"{measured}; not yet measured on a GPU" if description.device.startswith("cuda") else measured

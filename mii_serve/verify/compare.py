"""How different two outputs are. Numpy only.

SSIM is that of Wang, Bovik, Sheikh and Simoncelli (2004): a Gaussian window of 11 × 11 with deviation 1.5, K1 = 0.01,
K2 = 0.03, averaged over the places where the whole window fits, here for each colour by itself and then over the three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

WINDOW, DEVIATION = 11, 1.5
K1, K2 = 0.01, 0.03
LEVELS = 255.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """`max` and `mean` are absolute; the relative ones are shares of the expected output's largest value and of its root mean
    square.

    `psnr_db` and `ssim` are of pictures; the first is infinite where nothing differs.
    """

    max: float
    mean: float
    relative_max: float
    relative_rms: float
    psnr_db: float | None = None
    ssim: float | None = None


def difference(output: npt.ArrayLike, expected: npt.ArrayLike) -> Difference:
    """Between two arrays of one shape; a value that is not a number makes every figure not a number."""
    output, expected = np.asarray(output, np.float64), np.asarray(expected, np.float64)
    off = np.abs(output - expected)
    return Difference(
        max=float(off.max()),
        mean=float(off.mean()),
        relative_max=_part(float(off.max()), float(np.abs(expected).max())),
        relative_rms=_part(_rms(off), _rms(expected)),
    )


def picture_difference(output: npt.ArrayLike, expected: npt.ArrayLike) -> Difference:
    """Between two pictures, height × width × 3, in levels of 255."""
    plain = difference(output, expected)
    output, expected = np.asarray(output, np.float64), np.asarray(expected, np.float64)
    return Difference(
        max=plain.max,
        mean=plain.mean,
        relative_max=plain.relative_max,
        relative_rms=plain.relative_rms,
        psnr_db=psnr_db(output, expected),
        ssim=ssim(output, expected),
    )


def psnr_db(one: Array, other: Array) -> float:
    """Peak signal to noise ratio for a range of 255; infinite where nothing differs."""
    error = float(((one - other) ** 2).mean())
    return math.inf if error == 0 else 10 * math.log10(LEVELS**2 / error) if math.isfinite(error) else math.nan


def ssim(one: Array, other: Array) -> float:
    """Structural similarity of two pictures, height × width × colours, both at least 11 pixels high and wide."""
    c1, c2 = (K1 * LEVELS) ** 2, (K2 * LEVELS) ** 2
    mean_a, mean_b = _blurred(one), _blurred(other)
    var_a, var_b = _blurred(one * one) - mean_a**2, _blurred(other * other) - mean_b**2
    covariance = _blurred(one * other) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def _blurred(picture: Array) -> Array:
    """The Gaussian window's mean at every place where all of it fits."""
    weights = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / DEVIATION) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        picture = np.lib.stride_tricks.sliding_window_view(picture, WINDOW, axis=axis) @ weights
    return picture


def _rms(values: Array) -> float:
    return math.sqrt(float((values * values).mean()))


def _part(off: float, whole: float) -> float:
    if whole == 0:
        return 0.0 if off == 0 else math.inf
    return off / whole

"""Figures with the interval that they are known to: bootstrap over prompts.

Pictures of one prompt are alike, so whole prompts are drawn, with replacement. The draws have a fixed seed, so that the same
pictures give the same interval, and all scales are drawn alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
NUM_RESAMPLES = 1000
"""For means, which cost nothing."""
NUM_COSTLY = 100
"""For what takes long to compute."""
Z = 1.96
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """`low` and `high` bound the 95 % interval; None where there is one prompt, which says nothing of others.

    `bias` is by how much the value is too large because of the number of pictures, as the bootstrap estimates it; None where
    the value is a mean, which has none.
    """

    value: float
    low: float | None
    high: float | None
    num_pictures: int
    num_prompts: int
    bias: float | None = None


def resamples(num_prompts: int, count: int, seed: int = 0) -> Sequence[Ints]:
    """How often each prompt is drawn, for each of `count` draws."""
    random = np.random.default_rng(seed)
    return [np.bincount(random.integers(0, num_prompts, num_prompts), minlength=num_prompts) for _ in range(count)]


def mean_of(values: Sequence[float], prompt_numbers: Sequence[int], *, is_share: bool) -> Estimate:
    """The mean of one value for each picture, with the percentile interval.

    Where all values of a share are equal, no draw differs from another; then the rule of three bounds the share.
    """
    prompts, places = np.unique(np.asarray(prompt_numbers), return_inverse=True)
    num_prompts = len(prompts)
    sums = np.bincount(places, weights=np.asarray(values, dtype=np.float64), minlength=num_prompts)
    counts = np.bincount(places, minlength=num_prompts)
    value = float(sums.sum() / counts.sum())
    low = high = None
    if num_prompts > 1:
        drawn = [float(draw @ sums / (draw @ counts)) for draw in resamples(num_prompts, NUM_RESAMPLES)]
        low, high = (float(bound) for bound in np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
        if is_share and value in (0.0, 1.0):
            reach = min(1.0, 3 / num_prompts)
            low, high = (0.0, reach) if value == 0.0 else (1 - reach, 1.0)
    return Estimate(value=value, low=low, high=high, num_pictures=len(values), num_prompts=num_prompts)


def figure_of(compute: Callable[[Ints | None], float], prompt_numbers: Sequence[int]) -> Estimate:
    """A figure of all pictures together; `compute` is given how often each picture counts, None for once.

    The interval is the value ± 1.96 standard deviations of the draws. Their percentiles would not do: a figure that grows when
    pictures are fewer is larger in almost every draw, because a draw has fewer different pictures.
    """
    prompts, places = np.unique(np.asarray(prompt_numbers), return_inverse=True)
    value = compute(None)
    low = high = bias = None
    if len(prompts) > 1:
        drawn = [compute(draw[places]) for draw in resamples(len(prompts), NUM_COSTLY)]
        reach = Z * float(np.std(drawn, ddof=1))
        low, high, bias = max(0.0, value - reach), value + reach, float(np.mean(drawn)) - value
    return Estimate(value=value, low=low, high=high, bias=bias, num_pictures=len(prompt_numbers), num_prompts=len(prompts))

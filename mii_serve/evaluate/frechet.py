"""The squared Fréchet distance between two normal distributions that were fitted to features."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Normal:
    """A mean, and `root` with the covariance `root.T @ root`: a row for each picture, a column for each dimension."""

    mean: Floats
    root: Floats

    @classmethod
    def of(cls, features: npt.NDArray[np.floating], counts: npt.NDArray[np.integer] | None = None) -> Normal:
        """`counts` says how often each row of the features counts, once where it is None. Two must count at least."""
        values = features.astype(np.float64)
        if counts is not None:
            values, counts = values[counts > 0], counts[counts > 0]
        weights = np.ones(len(values)) if counts is None else counts.astype(np.float64)
        total = float(weights.sum())
        mean = weights @ values / total
        return cls(mean, (values - mean) * np.sqrt(weights / (total - 1))[:, None])

    @property
    def trace(self) -> float:
        return float(np.square(self.root).sum())


class Reference:
    """The distribution that others are compared with."""

    def __init__(self, normal: Normal) -> None:
        self._normal = normal
        self._covariance: Floats = normal.root.T @ normal.root

    @cached_property
    def _square_root(self) -> Floats:
        values, vectors = np.linalg.eigh(self._covariance)
        root: Floats = (vectors * np.sqrt(values.clip(0))) @ vectors.T
        return root

    def distance(self, other: Normal) -> float:
        """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), which is what FID computes of its network's features.

        C1 C2 has the eigenvalues of two symmetric matrices, beside zeros: one of as many rows as there are pictures, and one of
        as many as there are dimensions. The smaller one is taken.
        """
        apart = self._normal.mean - other.mean
        if other.root.shape[0] < other.root.shape[1]:
            product = other.root @ self._covariance @ other.root.T
        else:
            product = self._square_root @ (other.root.T @ other.root) @ self._square_root
        common = float(np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum())
        return max(0.0, float(apart @ apart) + self._normal.trace + other.trace - 2 * common)

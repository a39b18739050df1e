"""Fréchet distance between two sets of features, each taken as a Gaussian."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d) of some features."""

    mean: np.ndarray
    covariance: np.ndarray

    def distance(self, other: Moments) -> float:
        """Squared Fréchet distance to another set's Gaussian."""
        return sum(self.parts(other))

    def parts(self, other: Moments) -> tuple[float, float]:
        """That distance as what the means add to it, and what the covariances add."""
        return frechet_parts(self.mean, self.covariance, other.mean, other.covariance)


class Gaussian:
    """Mean (d,) and covariance (d, d) of features that come in parts, in float64.

    Parts are merged by their own means, so that no digits are lost where the mean is large.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: np.ndarray | None = None
        self._scatter: np.ndarray | None = None

    def add(self, features: np.ndarray) -> None:
        """Takes in (n, d) features."""
        features = np.asarray(features, dtype=np.float64)
        if features.ndim != 2 or not len(features):
            raise ValueError(f"features must be (n, d) with n above 0, got {features.shape}")
        mean = features.mean(axis=0)
        centred = features - mean
        if self._mean is None:
            self._mean, self._scatter = np.zeros_like(mean), np.zeros((len(mean), len(mean)))
        total = self.count + len(features)
        apart = mean - self._mean
        between = np.outer(apart, apart) * (self.count * len(features) / total)
        self._scatter = self._scatter + centred.T @ centred + between
        self._mean = self._mean + apart * (len(features) / total)
        self.count = total

    @property
    def mean(self) -> np.ndarray:
        if self._mean is None:
            raise ValueError("no features were added")
        return self._mean

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased: the sum over n - 1."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 features, got {self.count}")
        return self._scatter / (self.count - 1)

    @property
    def moments(self) -> Moments:
        return Moments(self.mean, self.covariance)

    def distance(self, other: Gaussian) -> float:
        """Squared Fréchet distance to another set's Gaussian."""
        return self.moments.distance(other.moments)


def frechet_distance(
    mean_1: np.ndarray, covariance_1: np.ndarray, mean_2: np.ndarray, covariance_2: np.ndarray
) -> float:
    """|μ1 − μ2|² + tr C1 + tr C2 − 2·tr (C1 C2)^½, the square of the distance."""
    return sum(frechet_parts(mean_1, covariance_1, mean_2, covariance_2))


def frechet_parts(
    mean_1: np.ndarray, covariance_1: np.ndarray, mean_2: np.ndarray, covariance_2: np.ndarray
) -> tuple[float, float]:
    """Of that sum the first term, and the other three.

    The last trace is the sum of the singular values of C1^½ C2^½, which keeps all digits where a
    root of the eigenvalues of C1 C2 would lose half of them.
    """
    product = square_root(covariance_1) @ square_root(covariance_2)
    shared = np.linalg.svd(product, compute_uv=False).sum()
    apart = np.sum(np.square(np.subtract(mean_1, mean_2, dtype=np.float64)))
    return float(apart), float(np.trace(covariance_1) + np.trace(covariance_2) - 2 * shared)


def square_root(covariance: np.ndarray) -> np.ndarray:
    """Of a symmetric matrix without negative eigenvalues, but for those of rounding."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, dtype=np.float64))
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T

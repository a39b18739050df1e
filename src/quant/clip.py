"""The scale with the least squared error on a histogram of absolute values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .grid import SMALLEST_SCALE, activation_limit, coarse_limit, fine_limit

SMALLEST_RATIO = 0.1
CANDIDATES = 48


@dataclass(frozen=True)
class Regions:
    """How codes are laid out: `coarse` 1 is the plain grid, see LayerConfig."""

    coarse: int = 1
    sides: int = 1

    def largest_code(self, bits: int) -> int:
        if self.coarse == 1:
            return activation_limit(bits)
        return coarse_limit(bits, self.sides) * self.coarse

    def codes(self, ratio: np.ndarray, bits: int) -> np.ndarray:
        """Codes of absolute values in units of the scale."""
        if self.coarse == 1:
            return np.minimum(np.rint(ratio), activation_limit(bits))
        fine, limit = fine_limit(bits), coarse_limit(bits, self.sides)
        large = np.minimum(np.rint(ratio / self.coarse), limit) * self.coarse
        return np.where(ratio <= fine, np.rint(ratio), large)


PLAIN = Regions()


def squared_error(
    values: np.ndarray,
    weights: np.ndarray,
    scales: np.ndarray,
    bits: int,
    regions: Regions = PLAIN,
) -> np.ndarray:
    """Mean squared error of quantizing values that count with weights, for each scale."""
    rounded = regions.codes(values / scales[:, None], bits) * scales[:, None]
    return (values - rounded) ** 2 @ weights / weights.sum()


def clipped_scale(
    values: np.ndarray,
    weights: np.ndarray,
    largest: float,
    bits: int,
    regions: Regions = PLAIN,
    smallest_scale: float = 0.0,
) -> tuple[float, float]:
    """The best scale that clips at a tenth of the largest value or above, and its mean squared
    error; with nothing counted, the scale that clips nothing.

    `largest` is known exactly, also where the values are a sample that missed it. No scale is
    below `smallest_scale`.
    """
    unclipped = max(float(largest) / regions.largest_code(bits), SMALLEST_SCALE)
    fallback = max(unclipped, smallest_scale)
    if not len(values) or weights.sum() <= 0 or largest <= 0:
        return fallback, 0.0
    scales = np.maximum(fallback * np.geomspace(SMALLEST_RATIO, 1, CANDIDATES), smallest_scale)
    scales[-1] = fallback
    values, weights = np.append(values, largest), np.append(weights, 1.0)
    errors = squared_error(values, weights, scales, bits, regions)
    best = len(errors) - 1 - int(np.argmin(errors[::-1]))  # of equals the one that clips least
    return float(scales[best]), float(errors[best])

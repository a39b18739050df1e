"""Structural similarity of pictures (Wang, Bovik, Sheikh and Simoncelli, 2004)."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..errors import UserError

WINDOW, DEVIATION = 11, 1.5  # of the Gaussian, in pixels
STABLE_MEAN, STABLE_VARIANCE = 0.01, 0.03  # of the values' range


def ssim(reference: np.ndarray, picture: np.ndarray, peak: float = 255.0) -> float:
    """Mean over all whole windows and channels, at most 1; pictures are (height, width, channels),
    and `peak` is the range of their values."""
    if reference.shape != picture.shape or reference.ndim != 3:
        raise UserError(
            f"pictures of shapes {reference.shape} and {picture.shape} cannot be compared; "
            "valid: both (height, width, channels)"
        )
    if min(reference.shape[:2]) < WINDOW:
        raise UserError(
            f"a picture of {reference.shape[:2]} is smaller than SSIM's {WINDOW} pixels"
        )
    x, y = np.asarray(reference, np.float64), np.asarray(picture, np.float64)
    mean_x, mean_y = smoothed(x), smoothed(y)
    variance_x = smoothed(x * x) - mean_x**2
    variance_y = smoothed(y * y) - mean_y**2
    covariance = smoothed(x * y) - mean_x * mean_y
    means, variances = (STABLE_MEAN * peak) ** 2, (STABLE_VARIANCE * peak) ** 2
    similar_means = (2 * mean_x * mean_y + means) / (mean_x**2 + mean_y**2 + means)
    similar_structure = (2 * covariance + variances) / (variance_x + variance_y + variances)
    return float(np.mean(similar_means * similar_structure))


def smoothed(values: np.ndarray) -> np.ndarray:
    """Gaussian means of every whole window: the first two axes shrink by the window less one."""
    kernel = gaussian()
    for axis in (0, 1):
        values = sliding_window_view(values, WINDOW, axis=axis) @ kernel
    return values


def gaussian() -> np.ndarray:
    """(window,) weights that sum to 1."""
    distance = np.arange(WINDOW) - (WINDOW - 1) / 2
    weights = np.exp(-np.square(distance) / (2 * DEVIATION**2))
    return weights / weights.sum()

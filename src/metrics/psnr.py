"""Peak signal-to-noise ratio of pictures."""

from __future__ import annotations

import numpy as np

from .signal import decibel


def psnr(reference: np.ndarray, picture: np.ndarray, peak: float = 255.0) -> float:
    """Peak over root mean squared error in dB, infinite for equal pictures; `peak` is the range of
    the values."""
    difference = np.asarray(reference, np.float64) - np.asarray(picture, np.float64)
    return decibel(peak**2, float(np.mean(np.square(difference))))

"""Histograms of absolute values with log-spaced bins, counted on the device.

A bin is what the exponent and the first four bits of a float's fraction say: 16 bins an octave,
3 to 6% wide, from 2^-18 to 2^16; what is smaller is in the first bin, what is larger in the last.
Only some of a large tensor is counted, evenly over tokens and channels. Percentiles are
interpolated within a bin: the bins put them off by at most 6%, typically by less than 1%, and the
counted sample adds noise of its own (2% at p99.9 of a normal distribution with 20,000 values). The
largest value is known exactly from elsewhere and not read off the bins.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

FRACTION_BITS = 4
PER_OCTAVE = 2**FRACTION_BITS
LOWEST_EXPONENT, HIGHEST_EXPONENT = -18, 16
BINS = PER_OCTAVE * (HIGHEST_EXPONENT - LOWEST_EXPONENT)

# On a CPU MLX counts a value in some 20 ns and NumPy in one.
COUNTED_VALUES = 4096
COUNTED_SHARE = 1 / 64

DROPPED_BITS = 23 - FRACTION_BITS
FIRST_CODE = (LOWEST_EXPONENT + 127) << FRACTION_BITS


def edges() -> np.ndarray:
    """BINS + 1 float64 edges; the first is 0, for what is smaller than the smallest bin."""
    octaves = 2.0 ** np.arange(LOWEST_EXPONENT, HIGHEST_EXPONENT)
    inner = octaves[:, None] * (1 + np.arange(PER_OCTAVE) / PER_OCTAVE)
    return np.concatenate([[0.0], inner.reshape(-1)[1:], [2.0**HIGHEST_EXPONENT]])


def bin_numbers(x: mx.array) -> mx.array:
    """The bin of each value, int32."""
    codes = mx.abs(x.astype(mx.float32)).view(mx.uint32) >> DROPPED_BITS
    return mx.clip(codes.astype(mx.int32) - FIRST_CODE, 0, BINS - 1)


def counting_stride(values: int, channels: int) -> int:
    """Every which value of a sample's (tokens × channels) is counted; coprime to the channels, so
    that all of them get their turn."""
    counted = max(COUNTED_VALUES, values * COUNTED_SHARE)
    stride = max(1, math.ceil(values / counted))
    while math.gcd(stride, channels) != 1:
        stride += 1
    return stride


def count(x: mx.array) -> mx.array:
    """(samples, values) to (samples, BINS) counts, int32, on the device."""
    samples = len(x)
    first = BINS * mx.arange(samples, dtype=mx.int32)[:, None]
    places = (bin_numbers(x) + first).reshape(-1)
    counts = mx.zeros((samples * BINS,), dtype=mx.int32).at[places].add(1)
    return counts.reshape(samples, BINS)


def tally(numbers: np.ndarray) -> np.ndarray:
    """The same from (samples, values) bin numbers, by NumPy."""
    return np.stack([np.bincount(row, minlength=BINS) for row in numbers]).astype(np.int32)


def weighted(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(BINS,) sums of the weights of the values in each bin."""
    places = np.array(bin_numbers(mx.array(x.astype(np.float32)))).reshape(-1)
    return np.bincount(places, weights.reshape(-1), minlength=BINS)


def percentile(counts: np.ndarray, share: float, largest: float) -> float:
    """The value below which `share` of the counted values lie; at 1 the known largest value."""
    total = counts.sum()
    if share >= 1 or total == 0:
        return float(largest)
    below = np.cumsum(counts)
    index = int(np.searchsorted(below, share * total))
    inside = 1 - (below[index] - share * total) / counts[index]
    low, high = edges()[index : index + 2]
    return float(min(low + inside * (high - low), largest))


def points(counts: np.ndarray, per_bin: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Values and their weights that stand for the counts: some evenly within each filled bin."""
    filled = np.flatnonzero(counts)
    low, high = edges()[filled], edges()[filled + 1]
    inside = (np.arange(per_bin) + 0.5) / per_bin
    values = low[:, None] + inside * (high - low)[:, None]
    weights = np.repeat(counts[filled] / per_bin, per_bin)
    return values.reshape(-1), weights

"""SmoothQuant: a factor per channel that the input is divided by and the weight multiplied with.

An input with few wide channels loses its small ones on a common grid; moving part of the width
into the weights helps as long as the weights' own grid of 4 bits bears it. So the strength is
searched on the layer's output error with both grids in the loop, and 0, no smoothing, is always a
candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from . import grid

LARGEST_FACTOR = 32.0  # beyond it, a weight's 4-bit row is ruled by single channels
STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
KEPT_SHARE = 0.99  # a smoothing must lower the error below this share of none


@dataclass(frozen=True)
class Rows:
    """Some input rows of one step, (rows, channels), and the tier they are quantized to."""

    x: np.ndarray
    bits: int


@dataclass(frozen=True)
class Reader:
    """One input and the weights that read it, stacked by rows.

    `widths` are the channels' largest |x - shift| over all that is known of the input: factors
    made from a few rows only would clip what those rows do not have.
    """

    samples: Sequence[Rows]
    weight: np.ndarray
    widths: np.ndarray
    shift: np.ndarray | None = None

    @property
    def centre(self) -> np.ndarray:
        zeros = np.zeros(self.weight.shape[1], np.float32)
        return zeros if self.shift is None else self.shift


def factors(inputs: np.ndarray, weights: np.ndarray, strength: float) -> np.ndarray:
    """Factors per channel from both sides' largest values; geometric mean 1 before the clip.

    A channel that is zero on either side keeps factor 1. Strength 0 gives ones.
    """
    used = (inputs > 0) & (weights > 0)
    smoothing = np.ones(len(inputs), dtype=np.float32)
    if strength == 0 or not used.any():
        return smoothing
    logs = strength * np.log(inputs[used]) - (1 - strength) * np.log(weights[used])
    smoothing[used] = np.exp(logs - logs.mean())
    return np.clip(smoothing, 1 / LARGEST_FACTOR, LARGEST_FACTOR)


def rounded_weight(weight: mx.array, smoothing: mx.array, bits: int, group_size: int) -> mx.array:
    """The weight as the integer grid gives it back, smoothing undone; bits 16 keep it."""
    if bits == 16:
        return weight
    scaled = weight * smoothing
    codes = grid.nearest_codes(scaled, grid.absmax_scale(scaled, bits, group_size), bits)
    return grid.dequantize(codes, grid.absmax_scale(scaled, bits, group_size)) / smoothing


def rounded_rows(rows: Rows, shift: mx.array, smoothing: mx.array) -> mx.array:
    """The rows as their tier's grid gives them back, shift and smoothing undone."""
    scaled = (mx.array(rows.x) - shift) / smoothing
    largest = mx.abs(scaled).max()
    scale = mx.maximum(largest / grid.activation_limit(rows.bits), grid.SMALLEST_SCALE)
    return grid.fake_quantize(scaled, scale, rows.bits) * smoothing + shift


def output_error(reader: Reader, smoothing: mx.array, weight_bits: int, group_size: int) -> float:
    """Squared output error over squared output, both grids in the loop."""
    weight, shift = mx.array(reader.weight.astype(np.float32)), mx.array(reader.centre)
    rounded = rounded_weight(weight, smoothing, weight_bits, group_size)
    error, power = mx.array(0.0), mx.array(0.0)
    for rows in reader.samples:
        wanted = mx.array(rows.x) @ weight.T
        # What the shift contributes is added in floats, from the 16-bit weight.
        got = (rounded_rows(rows, shift, smoothing) - shift) @ rounded.T + shift @ weight.T
        error = error + ((got - wanted) ** 2).sum()
        power = power + (wanted**2).sum()
    return float(error / mx.maximum(power, 1e-20))


@dataclass(frozen=True)
class Search:
    """What the search found: errors are relative to the squared output, mean over the readers."""

    strength: float
    smoothing: np.ndarray | None  # none at strength 0
    error: float
    error_without: float


def search(
    readers: Sequence[Reader],
    *,
    weight_bits: int = 4,
    group_size: int = 0,
    strengths: Sequence[float] = STRENGTHS,
) -> Search:
    """The strength with the least output error for inputs that must share their factors."""
    inputs = np.max([reader.widths for reader in readers], axis=0)
    columns = np.max([np.abs(reader.weight).max(axis=0) for reader in readers], axis=0)
    errors = {}
    for strength in sorted({0.0, *strengths}):
        smoothing = mx.array(factors(inputs, columns, strength))
        found = [output_error(r, smoothing, weight_bits, group_size) for r in readers]
        errors[strength] = float(np.mean(found))
    best = min(errors, key=errors.__getitem__)
    if errors[best] > KEPT_SHARE * errors[0.0]:
        best = 0.0
    smoothing = factors(inputs, columns, best) if best else None
    return Search(best, smoothing, errors[best], errors[0.0])

"""Quantized activations in the loop, each element left alone with some probability.

QDrop (Wei et al., arXiv:2203.05740): weights that only ever see quantized activations fit the noise
of the calibration data; dropping it at random flattens the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

DROP = 0.5  # probability that an element is not quantized


@dataclass(frozen=True)
class ActivationGrid:
    """Of one linear's input, per step key, after shift and smoothing."""

    scale: mx.array  # (steps,)
    limit: mx.array  # (steps,) Q, the largest code


def dropped_fake_quantize(
    grid: ActivationGrid, step: mx.array, key: mx.array, drop: float = DROP
) -> Callable[[mx.array], mx.array]:
    """A hook that quantizes each row by its own step's grid; gradients pass straight through."""
    scale, limit = grid.scale[step][:, None, None], grid.limit[step][:, None, None]

    def hook(x: mx.array) -> mx.array:
        codes = mx.clip(x / scale, -limit, limit)
        quantized = (codes + mx.stop_gradient(mx.round(codes) - codes)) * scale
        if drop == 0:
            return quantized
        return mx.where(mx.random.bernoulli(drop, x.shape, key), x, quantized)

    return hook

"""Linears that quantize their input and go on in floats: what a choice costs, without a runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .artifacts import LayerConfig
from .grid import SMALLEST_SCALE, activation_limit, coarse_limit, fine_limit, whole

Quantizer = Callable[[mx.array], mx.array]
Velocity = Callable[[mx.array, mx.array, mx.array, mx.array], mx.array]


class SimulatedLinear(nn.Module):
    """A linear behind a quantizer of its input; its weight stays as it is."""

    def __init__(self, linear: nn.Module, quantize: Quantizer) -> None:
        super().__init__()
        self.linear = linear
        self._quantize = quantize

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(self._quantize(x).astype(x.dtype))


class CurrentStep:
    """Which step each row of the batch is at; quantizers read it, a model's caller sets it."""

    def __init__(self, sigmas: Sequence[float]) -> None:
        self._sigmas = mx.array(np.asarray(sigmas, dtype=np.float32))
        self.rows = mx.array([0])

    def following(self, model: Velocity) -> Velocity:
        """The model, each call of which sets the rows from its timesteps: the nearest sigma."""

        def call(latent: mx.array, text: mx.array, pooled: mx.array, time: mx.array) -> mx.array:
            distance = mx.abs(time.astype(mx.float32)[:, None] / 1000 - self._sigmas)
            self.rows = mx.argmin(distance, axis=1)
            return model(latent, text, pooled, time)

        return call

    def per_row(self, values: mx.array, x: mx.array) -> mx.array:
        """One value per step as one per row, to be broadcast over x."""
        return values[self.rows].reshape(-1, *[1] * (x.ndim - 1))


def static_quantizer(step: CurrentStep, layer: LayerConfig) -> Quantizer:
    """x̂ = shift + smoothing·scale·codes, with the bits and the scale of each row's step."""
    limits = mx.array([float(activation_limit(bits)) for bits in layer.bits])
    fine = mx.array([float(fine_limit(bits)) for bits in layer.bits])
    coarse = mx.array([float(coarse_limit(bits, layer.coarse_sides)) for bits in layer.bits])
    scales = mx.array(np.asarray(layer.scale, dtype=np.float32))
    shift, smoothing = vectors(layer)

    def quantize(x: mx.array) -> mx.array:
        limit, scale = step.per_row(limits, x), step.per_row(scales, x) * smoothing
        ratio = (x.astype(mx.float32) - shift) / scale
        if layer.coarse == 1:
            codes = mx.clip(mx.round(ratio), -limit, limit)
        else:
            limits_here = step.per_row(fine, x), step.per_row(coarse, x)
            codes = two_region_codes(ratio, *limits_here, layer.coarse, layer.coarse_sides)
        return codes * scale + shift

    return quantize


def two_region_codes(
    ratio: mx.array, fine: mx.array, limit: mx.array, coarse: int, sides: int
) -> mx.array:
    """Whole numbers: -fine … fine, and beyond them multiples of `coarse` up to limit·coarse."""
    reach = mx.abs(ratio) if sides == 2 else ratio
    # One pass for both regions, in units of 1 or `coarse`.
    unit = 1 + (reach > fine) * float(coarse - 1)
    least = -limit if sides == 2 else -fine
    return mx.clip(whole(ratio / unit), least, limit) * unit


def token_quantizer(step: CurrentStep, layer: LayerConfig) -> Quantizer:
    """The same with a scale for each token, from its own largest value: the dynamic option."""
    limits = mx.array([float(activation_limit(bits)) for bits in layer.bits])
    shift, smoothing = vectors(layer)

    def quantize(x: mx.array) -> mx.array:
        scaled = (x.astype(mx.float32) - shift) / smoothing
        largest = mx.abs(scaled).max(axis=-1, keepdims=True)
        scale = mx.maximum(largest / step.per_row(limits, x), SMALLEST_SCALE)
        return mx.round(scaled / scale) * scale * smoothing + shift

    return quantize


def vectors(layer: LayerConfig) -> tuple[mx.array, mx.array]:
    """Shift and smoothing, neutral where the layer has none."""
    shift = mx.array(0.0) if layer.shift is None else mx.array(layer.shift)
    return shift, mx.array(1.0) if layer.smoothing is None else mx.array(layer.smoothing)

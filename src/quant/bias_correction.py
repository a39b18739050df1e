"""Bias correction: rounding must not move an output's mean (Nagel et al., arXiv:1906.04721)."""

from __future__ import annotations

import mlx.core as mx


def bias_correction(weight: mx.array, rounded: mx.array, input_mean: mx.array) -> mx.array:
    """(rows,) to add to the bias: (W − Ŵ)·E[x]."""
    return (weight - rounded) @ input_mean

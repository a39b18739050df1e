"""Ratios of signal to error, in decibels."""

from __future__ import annotations

import math

import mlx.core as mx


def sqnr_db(reference: mx.array, approximation: mx.array) -> float:
    """Power of the reference over power of the error; infinite where they are equal."""
    reference, approximation = reference.astype(mx.float32), approximation.astype(mx.float32)
    signal = mx.sum(mx.square(reference)).item()
    error = mx.sum(mx.square(reference - approximation)).item()
    return decibel(signal, error)


def decibel(signal: float, error: float) -> float:
    """10·log10 of a ratio of powers; no error is infinite, no signal is minus infinite."""
    if error == 0:
        return math.inf
    return -math.inf if signal == 0 else 10 * math.log10(signal / error)

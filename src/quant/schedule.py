"""Which step a noise level belongs to: a table over the calibrated sigmas.

Another number of steps, or another schedule, meets sigmas that were never measured: there the
clipped range is log-linear between the two neighbours, and the wider tier of the two holds. A
table of S steps is therefore spread to 2S − 1 places: even ones are steps, odd ones lie between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import UserError
from .grid import activation_limit

SAME_SIGMA = 1e-5  # relative: many roundings of float32, and far less than a step
SMALLEST_SIGMA = 1e-12


@dataclass(frozen=True)
class Schedule:
    """The calibrated sigmas, falling."""

    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        known = np.asarray(self.sigmas, dtype=np.float64)
        if not len(known) or not np.all(known > 0) or not np.all(np.diff(known) < 0):
            raise UserError(
                f"calibrated sigmas must fall and be above 0, got {list(self.sigmas)[:8]}"
            )

    def check(self, sigmas: Sequence[float]) -> None:
        """Raises for sigmas further outside the calibrated ones than these lie from each other."""
        known = self.sigmas
        first, last = (known[0] - known[1], known[-2] - known[-1]) if len(known) > 1 else (0, 0)
        slack = SAME_SIGMA * known[0]
        for sigma in sigmas:
            if not known[-1] - last - slack <= sigma <= known[0] + first + slack:
                raise UserError(
                    f"sigma {sigma:.4g} is outside the calibrated range, {known[-1]:.4g} to "
                    f"{known[0]:.4g}; collect activations at more steps, or use a schedule "
                    "within it"
                )

    def locate(self, sigma: mx.array) -> tuple[mx.array, mx.array]:
        """(rows,) places in a spread table, and how far each has come to the next step (0…1).

        Beyond either end the nearest step holds.
        """
        known = mx.array(np.asarray(self.sigmas, dtype=np.float32))
        last = len(self.sigmas) - 1
        sigma = mx.maximum(sigma.astype(mx.float32).reshape(-1), SMALLEST_SIGMA)
        reached = known[None] >= sigma[:, None] * (1 - SAME_SIGMA)
        place = reached.sum(axis=1) - 1
        low = mx.clip(place, 0, last)
        between = (place >= 0) & (place < last) & (known[low] > sigma * (1 + SAME_SIGMA))
        high = mx.minimum(low + 1, last)
        whole = mx.where(between, mx.log(known[low] / known[high]), 1.0)
        part = mx.where(between, mx.log(known[low] / sigma) / whole, 0.0)
        return 2 * low + between.astype(low.dtype), part


@dataclass(frozen=True)
class SpreadTable:
    """One layer's activation grid at every place: scale·exp(part·log_ratio), codes to ±limit."""

    scale: mx.array
    limit: mx.array
    log_ratio: mx.array


def spread_table(scale: Sequence[float], bits: Sequence[int]) -> SpreadTable:
    """Places of a layer's (steps,) scales and bits; at the steps the scales are as given."""
    steps = len(scale)
    given = np.asarray(scale, dtype=np.float32)
    limits = np.array([activation_limit(b) for b in bits], dtype=np.float64)
    ranges = given.astype(np.float64) * limits
    scales, wider, ratios = np.zeros((3, 2 * steps - 1))
    scales[::2], wider[::2] = given, limits
    wider[1::2] = np.maximum(limits[:-1], limits[1:])
    scales[1::2] = ranges[:-1] / wider[1::2]
    ratios[1::2] = np.log(ranges[1:] / ranges[:-1])
    return SpreadTable(*(mx.array(a.astype(np.float32)) for a in (scales, wider, ratios)))


class Step:
    """Where the sampler is: one object that all quantized layers of a model read."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.set_sigma(schedule.sigmas[0])

    def set_sigma(self, sigma: mx.array | float) -> None:
        """One noise level, or one for each row of the batch."""
        self.place, self.part = self.schedule.locate(mx.array(sigma))

    @contextmanager
    def at(self, sigma: mx.array | float) -> Iterator[None]:
        """The noise level while the context lasts; what a compiled function traces stays in it."""
        before = self.place, self.part
        self.set_sigma(sigma)
        try:
            yield
        finally:
            self.place, self.part = before

    def grid(self, table: SpreadTable, ndim: int) -> tuple[mx.array, mx.array]:
        """Scale and limit for an input of that many dimensions, one or one a row of the batch."""
        scale = table.scale[self.place] * mx.exp(self.part * table.log_ratio[self.place])
        return per_row(scale, ndim), per_row(table.limit[self.place], ndim)

    def vector(self, vectors: mx.array, ndim: int) -> mx.array:
        """Of (steps, channels) vectors the one of here, linear between steps; of one, that one."""
        if len(vectors) == 1:
            return vectors[0]
        low = self.place // 2
        high = mx.minimum(low + 1, len(vectors) - 1)
        here = vectors[low] + self.part[:, None] * (vectors[high] - vectors[low])
        return here.reshape(-1, *[1] * (ndim - 2), vectors.shape[1])


def per_row(values: mx.array, ndim: int) -> mx.array:
    """(rows,) values to be broadcast over an input of that many dimensions."""
    return values.reshape(-1, *[1] * (ndim - 1))

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

    def covers(self, sigma: float) -> bool:
        """Whether it lies no further outside the calibrated ones than these lie from each other."""
        known = self.sigmas
        first, last = (known[0] - known[1], known[-2] - known[-1]) if len(known) > 1 else (0, 0)
        slack = SAME_SIGMA * known[0]
        return known[-1] - last - slack <= sigma <= known[0] + first + slack

    def check(self, sigmas: Sequence[float]) -> None:
        """Raises for sigmas that are not covered."""
        for sigma in sigmas:
            if not self.covers(sigma):
                raise UserError(
                    f"sigma {sigma:.4g} is outside the calibrated range, {self.sigmas[-1]:.4g} to "
                    f"{self.sigmas[0]:.4g}; collect activations at more steps, or use a schedule "
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

    scale: np.ndarray
    limit: np.ndarray
    log_ratio: np.ndarray


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
    return SpreadTable(*(a.astype(np.float32) for a in (scales, wider, ratios)))


Grids = tuple[list[mx.array], list[mx.array]]  # scales and limits, by layer


class Step:
    """Where the sampler is: one object that all quantized layers of a model read.

    It holds their tables, so that the scales of all layers are found at once: each by itself would
    take as long as quantizing a small input.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._tables: list[SpreadTable] = []
        self._stacked: SpreadTable | None = None
        self.set_sigma(schedule.sigmas[0])

    def add(self, table: SpreadTable) -> int:
        """Keeps a layer's table; the number by which `grid` knows it."""
        self._tables.append(table)
        self._stacked, self._found = None, {}
        return len(self._tables) - 1

    def set_sigma(self, sigma: mx.array | float) -> None:
        """One noise level, or one for each row of the batch."""
        self.place, self.part = self.schedule.locate(mx.array(sigma))
        self._found: dict[int, Grids] = {}

    @contextmanager
    def at(self, sigma: mx.array | float) -> Iterator[None]:
        """The noise level while the context lasts; what a compiled function traces stays in it."""
        before = self.place, self.part, self._found
        self.set_sigma(sigma)
        try:
            yield
        finally:
            self.place, self.part, self._found = before

    def grid(self, number: int, ndim: int) -> tuple[mx.array, mx.array]:
        """A layer's scale and limit for an input of that many dimensions, one or one a row."""
        if ndim not in self._found:
            self._found[ndim] = self.grids(ndim)
        scales, limits = self._found[ndim]
        return scales[number], limits[number]

    def grids(self, ndim: int) -> Grids:
        """All layers' scales and limits of here, cut apart in one operation."""
        if self._stacked is None:
            fields = (vars(table).values() for table in self._tables)
            self._stacked = SpreadTable(*(np.stack(field) for field in zip(*fields, strict=True)))
        scale, limit, ratio = (
            mx.array(field)[:, self.place] for field in vars(self._stacked).values()
        )
        layers, here = len(self._tables), (scale * mx.exp(self.part * ratio), limit)
        apart = (mx.split(values.reshape(-1), layers) for values in here)
        return tuple([per_row(values, ndim) for values in own] for own in apart)

    def vector(self, vectors: mx.array, ndim: int) -> mx.array:
        """Of (steps, channels) vectors the one of here, linear between steps; of one, that one."""
        if len(vectors) == 1:
            return vectors.squeeze(0)
        low = self.place // 2
        high = mx.minimum(low + 1, len(vectors) - 1)
        here = vectors[low] + self.part[:, None] * (vectors[high] - vectors[low])
        return here.reshape(-1, *[1] * (ndim - 2), vectors.shape[1])


def per_row(values: mx.array, ndim: int) -> mx.array:
    """(rows,) values to be broadcast over an input of that many dimensions.

    One for all rows has no dimensions itself: compiled code reads whatever has some by its strides,
    one number at a time, and on a GPU that can take ten times as long.
    """
    if ndim == 1:
        return values
    return values.squeeze(0) if len(values) == 1 else values.reshape(-1, *[1] * (ndim - 1))

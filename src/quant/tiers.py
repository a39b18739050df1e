"""Which tier each input gets at each step: by thresholds on its range, or within a budget of error.

Tables are (inputs, steps) arrays of bits. Average bits count every linear at every step once, so
an input that q, k and v read counts three times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import UserError
from .grid import check_bits


def number(default: float, help: str) -> float:
    """A number of the rule, with the words that the command line says of it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Thresholds:
    """The published rule's numbers. Ranges are largest absolute values, in the input's unit."""

    a4_below: float = number(6.0, "A4 below this range")
    a4_below_shifted: float = number(5.0, "the same for post-GELU inputs, after the shift")
    a6_below: float = number(10.0, "A6 below this range, A8 from it on")
    high_ratio: float = number(50.0, "A8 also where p99/p50 is above this")
    spike_ratio: float = number(5.0, "spikes are looked for where p100/p99 is above this")
    spike_channels: float = number(0.05, "they are isolated in less than this share of channels")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"--{name.replace('_', '-')} must be above 0, got {value}")
        for name in ("a4_below", "a4_below_shifted"):
            if getattr(self, name) > self.a6_below:
                raise UserError(
                    f"thresholds are out of order: --{name.replace('_', '-')} "
                    f"{getattr(self, name)} is above --a6-below {self.a6_below}"
                )


@dataclass(frozen=True)
class Range:
    """What the rule looks at: one input at one step, after the shift where there is one."""

    p50: float
    p99: float
    channels: np.ndarray  # largest absolute value of each
    shifted: bool

    @property
    def absmax(self) -> float:
        return float(self.channels.max())


def check_tiers(tiers: Sequence[int]) -> tuple[int, ...]:
    """The tiers in rising order; none, or an impossible one, is an error."""
    if not tiers:
        raise UserError("--tiers names no tier; valid: some of 4,6,8")
    for bits in tiers:
        check_bits(bits, "--tiers")
    return tuple(sorted(set(tiers)))


def check_average(bits: float, tiers: Sequence[int]) -> None:
    """An average that even the lowest tier exceeds is an error."""
    if not bits >= tiers[0]:
        raise UserError(
            f"--average-bits {bits} is below the lowest tier, {tiers[0]}; raise it or allow a "
            "lower tier"
        )


def has_spikes(found: Range, thresholds: Thresholds) -> bool:
    """Whether a few channels stand far above all others: what smoothing is for.

    Any channel of a normal distribution has values above p99, so a channel counts as one of the
    spikes when it reaches above p99 times the spike ratio.
    """
    height = thresholds.spike_ratio * found.p99
    share = float(np.mean(found.channels > height))
    return 0 < share < thresholds.spike_channels


def threshold_tier(
    found: Range, thresholds: Thresholds, tiers: Sequence[int], smoothed: bool = False
) -> int:
    """Bits of one input at one step by the published rule, of those allowed the next wider.

    What has spikes moves one tier down, but only where smoothing does deal with them.
    """
    a4_below = thresholds.a4_below_shifted if found.shifted else thresholds.a4_below
    if found.absmax >= thresholds.a6_below or found.p99 > thresholds.high_ratio * found.p50:
        wanted = 8
    else:
        wanted = 4 if found.absmax < a4_below else 6
    if smoothed and has_spikes(found, thresholds):
        wanted = max(4, wanted - 2)
    return next((bits for bits in tiers if bits >= wanted), tiers[-1])


def average_bits(bits: np.ndarray, linears: np.ndarray) -> float:
    """Mean over linears and steps; `linears` says how many read each input."""
    return float((bits * linears[:, None]).sum() / (linears.sum() * bits.shape[1]))


@dataclass(frozen=True)
class Frontier:
    """The least error for every number of bits, and the way back to its tiers."""

    tiers: tuple[int, ...]
    unit: int  # bits to one unit of budget
    linears: np.ndarray  # per cell
    least: np.ndarray  # error by units spent above the lowest tier
    choices: np.ndarray  # (cells, units) index of the tier

    def within_bits(self, average: float) -> int:
        """Units that an average number of bits, at least the lowest tier, allows."""
        spare = (average - self.tiers[0]) * self.linears.sum() / self.unit
        return min(int(spare + 1e-9), len(self.least) - 1)

    def within_error(self, error: float) -> int:
        """The fewest units with at most that error; all where even that is not enough."""
        enough = np.flatnonzero(self.least <= error)
        return int(enough[0]) if len(enough) else len(self.least) - 1

    def tiers_at(self, units: int) -> np.ndarray:
        """Bits of every cell when at most so many units are spent."""
        indices = np.empty(len(self.linears), dtype=np.int64)
        for cell in range(len(self.linears) - 1, -1, -1):
            index = self.choices[cell, units]
            indices[cell] = index
            units -= self.linears[cell] * (self.tiers[index] - self.tiers[0]) // self.unit
        return np.asarray(self.tiers)[indices]


def frontier(errors: np.ndarray, linears: np.ndarray, tiers: tuple[int, ...]) -> Frontier:
    """Exact dynamic programming over (cells, tiers) errors that add up.

    A cell is one input at one step; `linears` says how many linears read it, and so how much its
    bits count.
    """
    unit = math.gcd(*(b - tiers[0] for b in tiers)) or 1
    costs = linears[:, None] * ((np.asarray(tiers) - tiers[0]) // unit)
    units = int(costs.max(axis=1).sum()) + 1
    least = np.zeros(units)
    choices = np.zeros((len(errors), units), dtype=np.uint8)
    for cell, (error, cost) in enumerate(zip(errors, costs, strict=True)):
        options = np.full((len(tiers), units), np.inf)
        for index in range(len(tiers)):
            options[index, cost[index] :] = least[: units - cost[index]] + error[index]
        choices[cell] = options.argmin(axis=0)
        least = options.min(axis=0)
    return Frontier(tiers, unit, linears, least, choices)

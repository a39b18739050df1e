"""How values and their changes from step to step are put on a grid: by a table, or by themselves.

A quantizer is called with what is left to be told, float32, and with whether it is the first step
of a picture; it gives whole codes, what one of them is worth, and what code 0 stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ..errors import UserError
from .grid import SMALLEST_SCALE, activation_limit, check_bits, whole
from .linear import QuantizedLinear
from .schedule import Step, spread_table

STATIC = "static"
RANGE = "range"
GUIDANCE = "guidance"
DYNAMIC = ("tensor", "token", RANGE, GUIDANCE, "channel")
KINDS = (STATIC, *DYNAMIC)
ANCHOR_BITS = 8  # of a picture's first step, which all later ones build on
# Of the largest value. Heavy tails at few bits are clipped far down.
CLIP_RATIOS = tuple(np.geomspace(1, 0.03, 30).tolist())
# Times the squared error of what is clipped of a change: it comes back on top of the next change,
# and pictures that were not measured on have larger ones.
CLIPPED_CHANGE = 10.0
BINS = 4096  # of absolute values, on which a scale is searched


class Told(NamedTuple):
    """What x becomes: codes·factor, about the `middle` where there is one."""

    codes: mx.array  # whole
    factor: mx.array  # that broadcasts over them
    middle: mx.array | None = None  # (…, 1), the same for all channels of a token

    @property
    def values(self) -> mx.array:
        """float32"""
        values = self.codes * self.factor
        return values if self.middle is None else values + self.middle


class Quantizer(Protocol):
    @property
    def largest(self) -> int | None:
        """The largest code; none where a product needs the values themselves."""

    def __call__(self, x: mx.array, first: bool) -> Told:
        """x on the grid."""


def check_kind(kind: str, what: str) -> None:
    if kind not in KINDS:
        raise UserError(f"unknown {what} {kind!r}; valid: {', '.join(KINDS)}")


def codes_of(x: mx.array, scale: mx.array, limit: mx.array | int) -> mx.array:
    return mx.clip(whole(x / scale), -limit, limit)


@dataclass(frozen=True)
class Dynamic:
    """Scales from the values' own largest ones: of each picture, of each token, or of each channel
    of each picture; or from each token's range, smallest to largest. Nothing is clipped.

    `guidance` is each token's range, of differences between tokens where `in_pairs` holds.
    """

    bits: int
    per: str
    first_bits: int = ANCHOR_BITS

    def __post_init__(self) -> None:
        check_bits(self.bits, "bits of an activation")
        if self.per not in DYNAMIC:
            raise UserError(f"unknown scales {self.per!r}; valid: {', '.join(DYNAMIC)}")

    @property
    def largest(self) -> int | None:
        # A factor a channel stands inside the product's sum.
        if self.per == "channel":
            return None
        return activation_limit(max(self.bits, self.first_bits))

    @property
    def about_middle(self) -> bool:
        return self.per in (RANGE, GUIDANCE)

    def __call__(self, x: mx.array, first: bool) -> Told:
        limit, middle = activation_limit(self.first_bits if first else self.bits), None
        if self.about_middle:
            highest, lowest = x.max(axis=-1, keepdims=True), x.min(axis=-1, keepdims=True)
            largest, middle = (highest - lowest) / 2, (highest + lowest) / 2
            x = x - middle
        else:
            largest = mx.abs(x).max(axis=self.axes(x.ndim), keepdims=True)
        scale = mx.maximum(largest / limit, SMALLEST_SCALE)
        return Told(codes_of(x, scale, limit), scale, middle)

    def axes(self, ndim: int) -> tuple[int, ...]:
        """Over which a scale holds: the first one counts pictures, the last one channels."""
        if self.per == "token":
            return (-1,)
        if self.per == "tensor":
            return tuple(range(1, ndim))
        if ndim < 3:
            raise UserError("scales per channel need tokens: an input (pictures, tokens, channels)")
        return tuple(range(1, ndim - 1))


def in_pairs(quantizer: Quantizer) -> bool:
    """Whether, with guidance, it is to be given differences of the negative prompts' rows.

    Guidance takes w times the prompt's velocity less w − 1 times the negative's: an error that both
    have counts once, one that only one of them has w or w − 1 times.
    """
    return isinstance(quantizer, Dynamic) and quantizer.per == GUIDANCE


def as_differences(x: mx.array) -> tuple[mx.array, mx.array]:
    """x with those tokens of the negative prompts, its second half, less the prompts' own whose
    range is smaller so; and which these are, (negatives, …, 1)."""
    if x.ndim < 2 or len(x) % 2:
        raise UserError(
            f"an input of shape {x.shape} is not that of prompts and as many negative ones; give "
            "both, or call reset_cache() without guided"
        )
    prompts, negatives = halves(x)
    change = negatives - prompts
    smaller = width(change) < width(negatives)
    return mx.concatenate([prompts, mx.where(smaller, change, negatives)]), smaller


def from_differences(y: mx.array, smaller: mx.array) -> mx.array:
    """What `as_differences` was given: of x itself, or of what is linear in it."""
    prompts, negatives = halves(y)
    return mx.concatenate([prompts, negatives + mx.where(smaller, prompts, 0)])


def halves(x: mx.array) -> tuple[mx.array, mx.array]:
    """Of the batch. By indices: with slices or `split` MLX does not compile a step of three layers
    that keep the same input."""
    number = len(x) // 2
    return tuple(mx.take(x, mx.arange(first, first + number), axis=0) for first in (0, number))


def width(x: mx.array) -> mx.array:
    return x.max(axis=-1, keepdims=True) - x.min(axis=-1, keepdims=True)


class Static:
    """Scales that were measured before, one for each step of a schedule."""

    def __init__(self, level: Step, bits: Sequence[int], scales: Sequence[float]) -> None:
        steps = len(level.schedule.sigmas)
        if len(scales) != steps or len(bits) != steps:
            raise UserError(
                f"{len(scales)} scales and {len(bits)} bits for a schedule of {steps} steps; "
                "measure them for this schedule"
            )
        for value in bits:
            check_bits(value, "bits of an activation")
        self._level, self._largest = level, activation_limit(max(bits))
        self._number = level.add(spread_table(scales, bits))

    @property
    def largest(self) -> int | None:
        return self._largest

    def __call__(self, x: mx.array, first: bool) -> Told:
        scale, limit = self._level.grid(self._number, x.ndim)
        return Told(codes_of(x, scale, limit), scale)


@dataclass
class Search:
    """Finds a scale for all that it is shown at a step, uses it at once, and writes it down.

    So the inputs of later layers and steps are those of the quantized model.
    """

    bits: int
    first_bits: int = ANCHOR_BITS
    clipped: float = 1.0  # what an error counts where values are clipped; elsewhere 1
    found: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_bits(self.bits, "bits of an activation")

    @property
    def largest(self) -> int | None:
        return activation_limit(max(self.bits, self.first_bits))

    def __call__(self, x: mx.array, first: bool) -> Told:
        bits = self.first_bits if first else self.bits
        scale = best_scale(x, bits, self.clipped)
        self.found.append(scale)
        return Told(codes_of(x, mx.array(scale), activation_limit(bits)), mx.array(scale))


def best_scale(x: mx.array, bits: int, clipped: float = 1.0) -> float:
    """Of scales that clip more and more the one with the least squared error, times `clipped` for
    the values that are.

    All values count: a sample would have few of the largest, and so clip too many.
    """
    largest = float(mx.abs(x).max())
    if not largest > SMALLEST_SCALE * activation_limit(bits):
        return SMALLEST_SCALE
    counts = histogram(x, largest, on_device=mx.default_device() != mx.Device(mx.cpu))
    scales, errors = clipping_errors(bits, clipped)
    return float(scales[np.argmin(errors @ counts)]) * largest


def histogram(x: mx.array, largest: float, on_device: bool) -> np.ndarray:
    """(BINS + 1,) counts of absolute values up to the largest; the same wherever they are counted.

    A device gives away no more than them: values would take longer to be copied than to be counted.
    """
    places = (mx.abs(x).reshape(-1) * mx.array(BINS / largest, dtype=mx.float32)).astype(mx.int32)
    if on_device:
        counts = mx.zeros((BINS + 1,), dtype=mx.int32).at[mx.minimum(places, BINS)].add(1)
        return np.array(counts)
    return np.bincount(np.minimum(np.array(places), BINS), minlength=BINS + 1)


@lru_cache
def clipping_errors(bits: int, clipped: float) -> tuple[np.ndarray, np.ndarray]:
    """(scales,) and (scales, BINS + 1) squared errors of the bins, where the largest value is 1."""
    centres, limit = (np.arange(BINS + 1) + 0.5) / BINS, activation_limit(bits)
    scales = np.array(CLIP_RATIOS)[:, None] / limit
    errors = np.square(centres - np.minimum(np.round(centres / scales), limit) * scales)
    errors *= np.where(centres > (limit + 0.5) * scales, clipped, 1.0)
    return scales[:, 0], errors


@dataclass(frozen=True)
class OwnGrid:
    """A quantized linear's own, which the activation track has chosen for its input as it is."""

    layer: QuantizedLinear

    @property
    def largest(self) -> int | None:
        return self.layer.largest_code()

    def __call__(self, x: mx.array, first: bool) -> Told:
        return Told(*self.layer.quantized(x))

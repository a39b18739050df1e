"""How values and their changes from step to step are put on a grid: by a table, or by themselves.

A quantizer is called with what is left to be told, float32, and with whether it is the first step
of a picture; it gives whole codes and what one of them is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import numpy as np

from ..errors import UserError
from .grid import SMALLEST_SCALE, activation_limit, check_bits, whole
from .linear import QuantizedLinear
from .schedule import Step, spread_table

STATIC = "static"
DYNAMIC = ("tensor", "token", "channel")
KINDS = (STATIC, *DYNAMIC)
ANCHOR_BITS = 8  # of a picture's first step, which all later ones build on
# Of the largest value. Heavy tails at few bits are clipped far down.
CLIP_RATIOS = tuple(np.geomspace(1, 0.03, 30).tolist())
BINS = 4096  # of absolute values, on which a scale is searched


class Quantizer(Protocol):
    @property
    def largest(self) -> int | None:
        """The largest code; none where a product needs the values themselves."""

    def __call__(self, x: mx.array, first: bool) -> tuple[mx.array, mx.array]:
        """Whole float32 codes, and a factor that broadcasts over them."""


def check_kind(kind: str, what: str) -> None:
    if kind not in KINDS:
        raise UserError(f"unknown {what} {kind!r}; valid: {', '.join(KINDS)}")


def codes_of(x: mx.array, scale: mx.array, limit: mx.array | int) -> mx.array:
    return mx.clip(whole(x / scale), -limit, limit)


@dataclass(frozen=True)
class Dynamic:
    """Scales from the values' own largest ones: of each picture, of each token, or of each channel
    of each picture. Nothing is clipped."""

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

    def __call__(self, x: mx.array, first: bool) -> tuple[mx.array, mx.array]:
        limit = activation_limit(self.first_bits if first else self.bits)
        scale = mx.abs(x).max(axis=self.axes(x.ndim), keepdims=True) / limit
        scale = mx.maximum(scale, SMALLEST_SCALE)
        return codes_of(x, scale, limit), scale

    def axes(self, ndim: int) -> tuple[int, ...]:
        """Over which a scale holds: the first one counts pictures, the last one channels."""
        if self.per == "token":
            return (-1,)
        if self.per == "tensor":
            return tuple(range(1, ndim))
        if ndim < 3:
            raise UserError("scales per channel need tokens: an input (pictures, tokens, channels)")
        return tuple(range(1, ndim - 1))


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

    def __call__(self, x: mx.array, first: bool) -> tuple[mx.array, mx.array]:
        scale, limit = self._level.grid(self._number, x.ndim)
        return codes_of(x, scale, limit), scale


@dataclass
class Search:
    """Finds a scale for all that it is shown at a step, uses it at once, and writes it down.

    So the inputs of later layers and steps are those of the quantized model.
    """

    bits: int
    first_bits: int = ANCHOR_BITS
    found: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_bits(self.bits, "bits of an activation")

    @property
    def largest(self) -> int | None:
        return activation_limit(max(self.bits, self.first_bits))

    def __call__(self, x: mx.array, first: bool) -> tuple[mx.array, mx.array]:
        bits = self.first_bits if first else self.bits
        scale = best_scale(x, bits)
        self.found.append(scale)
        return codes_of(x, mx.array(scale), activation_limit(bits)), mx.array(scale)


def best_scale(x: mx.array, bits: int) -> float:
    """Of scales that clip more and more the one with the least squared error.

    All values count: a sample would have few of the largest, and so clip too many.
    """
    limit, values = activation_limit(bits), np.abs(np.array(x)).reshape(-1)
    largest = float(values.max())
    if not largest > SMALLEST_SCALE * limit:
        return SMALLEST_SCALE
    places = (values * np.float32(BINS / largest)).astype(np.int32)
    counts = np.bincount(places, minlength=BINS + 1)
    centres = (np.arange(BINS + 1) + 0.5) / BINS
    scales = np.array(CLIP_RATIOS)[:, None] / limit
    errors = centres - np.minimum(np.round(centres / scales), limit) * scales
    return float(scales[np.argmin(np.square(errors) @ counts), 0]) * largest


@dataclass(frozen=True)
class OwnGrid:
    """A quantized linear's own, which the activation track has chosen for its input as it is."""

    layer: QuantizedLinear

    @property
    def largest(self) -> int | None:
        return self.layer.largest_code()

    def __call__(self, x: mx.array, first: bool) -> tuple[mx.array, mx.array]:
        return self.layer.quantized(x)

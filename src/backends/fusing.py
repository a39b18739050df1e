"""What a backend may do beyond a product: quantize its input by itself, end with more than sums.

A layer that finds such a backend gives it the grid instead of codes, and the bias with it. What
codes and tables look like is the backend's own business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx

from ..errors import UserError


@dataclass(frozen=True)
class InputGrid:
    """How an input becomes codes: clip(round((x − shift) / smoothing / scale), −limit, limit).

    `scales` and `limits` have one entry, or one for each row of the batch, and so may the shift.
    Per token the scale is the token's largest value over the limit instead.
    """

    scales: mx.array  # (entries,) float32
    limits: mx.array  # (entries,) float32
    shift: mx.array | None = None  # (columns,) or (entries, columns) float32
    smoothing: mx.array | None = None  # (columns,) float32
    per_token: bool = False

    @classmethod
    def of_codes(cls, limit: int) -> InputGrid:
        """For an input that holds codes already."""
        return cls(mx.array([1.0]), mx.array([float(limit)]))

    def check(self, rows: int, columns: int) -> None:
        """Raises unless it has what a kernel reads for so many rows; by shapes alone, since it is
        asked at every call."""
        shift, smoothing = self.shift, self.smoothing
        entries, limits = self.scales.size, self.limits.size
        if not entries or rows % entries:
            valid = f"a divisor of the number of rows, {rows}"
            raise unfit("number of scales", entries, valid, "give one for each entry of the batch")
        if limits != entries:
            raise unfit("number of limits", limits, entries, "give one for each scale")
        if shift is not None and (
            shift.shape[-1:] != (columns,) or shift.size not in (columns, entries * columns)
        ):
            valid = f"({columns},) or ({entries}, {columns})"
            raise unfit("shape of the shift", shift.shape, valid, "give a number for each column")
        if smoothing is not None and smoothing.shape != (columns,):
            way_out = "give a number for each column"
            raise unfit("shape of the smoothing", smoothing.shape, (columns,), way_out)

    def arrays(self, rows: int, columns: int) -> list[mx.array]:
        """What a quantizing kernel reads beside its input, in this order: scales, limits, shift and
        smoothing, with anything in the place of what is absent and so not read."""
        self.check(rows, columns)
        return [
            self.scales.flatten(),
            self.limits.flatten(),
            nothing(2) if self.shift is None else self.shift.reshape(-1, columns),
            nothing(1) if self.smoothing is None else self.smoothing,
        ]

    def flags(self) -> list[tuple[str, bool]]:
        """Which of these it reads, as a kernel's template takes it."""
        return [
            ("TOKEN", self.per_token),
            ("SHIFT", self.shift is not None),
            ("SMOOTH", self.smoothing is not None),
        ]


@lru_cache
def nothing(ndim: int) -> mx.array:
    """For a place that is not read."""
    zero = mx.zeros([1] * ndim)
    mx.eval(zero)
    return zero


@dataclass(frozen=True)
class Modulation:
    """A layer norm without weights, times 1 + scale, plus shift, each (entries, columns): one
    vector, or one for each row of the batch."""

    scale: mx.array
    shift: mx.array
    eps: float

    def fits(self, x: mx.array) -> bool:
        """Whether a kernel can read it beside x, which is (batch, tokens, columns)."""
        return is_per_entry(self.scale, x) and is_per_entry(self.shift, x)


def is_per_entry(vectors: mx.array, x: mx.array) -> bool:
    """Whether these are one vector for all or for each entry of the batch, in the dtype of x."""
    shapes = [(entries, x.shape[-1]) for entries in (1, len(x))]
    return x.ndim == 3 and x.size > 0 and vectors.shape in shapes and vectors.dtype == x.dtype


@runtime_checkable
class Fusing(Protocol):
    """Quantizes inputs, and ends products with the scales, the bias and the cast."""

    def fuses(self, operand: dict[str, Any]) -> bool:
        """Whether what follows can be used with this weight here."""

    def quantize(self, x: mx.array, grid: InputGrid) -> Any:
        """Codes of (…, columns) floats, for all the products that take them."""

    def bias_table(self, operand: dict[str, Any], biases: mx.array) -> mx.array:
        """(steps, numbers) of (steps, outputs) biases; its rows may be mixed as biases may."""

    def product(
        self, codes: Any, operand: dict[str, Any], dtype: mx.Dtype, columns: mx.array | None = None
    ) -> mx.array:
        """(rows, outputs); `columns` is a row of a bias table, none adds no bias."""


@runtime_checkable
class Chaining(Fusing, Protocol):
    """Ends a product with GELU and the codes of the next product's input, in a static grid."""

    def input_table(
        self, shifts: mx.array | None, smoothing: mx.array | None, columns: int
    ) -> mx.array:
        """(steps, numbers) of (steps, columns) shifts; its rows may be mixed as shifts may."""

    def following(self, row: mx.array, scale: mx.array, limit: mx.array) -> Any:
        """The next input's grid: a row of its table, and its scale and limit, (1,) each."""

    def product_gelu(
        self,
        codes: Any,
        operand: dict[str, Any],
        following: Any,
        columns: mx.array | None = None,
    ) -> Any:
        """Codes of GELU (its tanh form) of the product, for the next one."""


@runtime_checkable
class Normalizing(Fusing, Protocol):
    """Begins with the modulated layer norm, so that what comes between is never written."""

    def quantize_modulated(self, x: mx.array, modulation: Modulation, grid: InputGrid) -> Any:
        """Codes of what the modulation, which fits, makes of (batch, tokens, columns) floats."""


@runtime_checkable
class Adding(Fusing, Protocol):
    """Ends a product with a gate and the residual."""

    def product_added(
        self,
        codes: Any,
        operand: dict[str, Any],
        residual: mx.array,
        gate: mx.array,
        columns: mx.array | None = None,
    ) -> mx.array:
        """(batch, tokens, outputs) residual + gate · product, of (1 or batch, outputs) gates, in
        the residual's dtype, which is the gates' too."""


@runtime_checkable
class Merging(Fusing, Protocol):
    """Multiplies by several weights at once, where these read the same codes."""

    def merged(self, operands: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """One operand of all their outputs, side by side, whose parts they are from then on; none
        where they cannot lie so."""


def unfit(what: str, found: object, valid: object, way_out: str) -> UserError:
    """Of an operand in whose place a kernel would read more numbers, or others, than it has."""
    return UserError(f"{what}: {found}; valid: {valid}; {way_out}")


def check_depth(codes: int, weight: int) -> None:
    """Raises unless codes have as many columns as the weight that they meet."""
    if codes != weight:
        raise unfit("columns of the codes", codes, weight, "give an input as wide as the weight")


def check_factors(factors: mx.array, rows: int) -> None:
    """Raises unless there is one factor for all rows, or one for each."""
    if factors.size not in (1, rows):
        raise unfit("number of factors", factors.size, f"1 or {rows}", "give one for each row")


def multiply_codes(
    backend: Fusing, x: mx.array, factor: mx.array, operand: dict[str, Any], limit: int
) -> mx.array:
    """A backend's `multiply` by its own kernels, for an input that holds codes up to the limit."""
    shape = (*x.shape[:-1], len(operand["scales"]))
    if x.size == 0:
        return mx.zeros(shape)
    codes = backend.quantize(x, InputGrid.of_codes(limit))
    factor = mx.broadcast_to(factor.astype(mx.float32), (*x.shape[:-1], 1)).reshape(-1)
    return backend.product(codes.times(factor), operand, mx.float32).reshape(shape)

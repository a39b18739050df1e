"""A backend that fuses, in MLX's own operations: what a kernel does in two launches, step by step.

Codes are float32 matrices; tables are the vectors themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from src.backends import Weight, named
from src.backends.fusing import InputGrid, Modulation

import mlx.core as mx
import mlx.nn as nn

SMALLEST = 1e-12  # scale of a token


@dataclass(frozen=True)
class Codes:
    values: mx.array  # (rows, columns)
    scales: mx.array  # (rows, 1)


@dataclass(frozen=True)
class Following:
    factor: mx.array  # (columns,)
    term: mx.array
    scale: mx.array
    limit: mx.array


@dataclass
class FusingBackend:
    """Multiplies as the reference does; counts how often it quantizes, begins with a layer norm,
    and ends with GELU or with a residual."""

    name: str = "fusing"
    quantized: int = 0
    chained: int = 0
    normalized: int = 0
    added: int = 0
    multiplied: int = 0
    merges: bool = False
    refuses: set[int] = field(default_factory=set)  # widths of weights that it leaves to others

    def prepare(self, weight: Weight, dtype: mx.Dtype, largest: int | None) -> dict[str, Any]:
        operand = named("reference").prepare(weight, dtype, largest)
        own = largest is not None and weight.groups == 1 and weight.columns not in self.refuses
        return {**operand, "own": own, "codes": weight.codes()}

    def multiply(self, x: mx.array, factor: mx.array | None, operand: dict[str, Any]) -> mx.array:
        return named("reference").multiply(x, factor, operand)

    def fuses(self, operand: dict[str, Any]) -> bool:
        return operand["own"]

    def quantize(self, x: mx.array, grid: InputGrid) -> Codes:
        """Each entry of the grid for as many rows of the batch."""
        self.quantized += 1
        columns = x.shape[-1]
        x = x.astype(mx.float32).reshape(-1, columns)
        scale, limit = (entries_of(v, len(x)) for v in (grid.scales[:, None], grid.limits[:, None]))
        if grid.shift is not None:
            x = x - entries_of(grid.shift.reshape(-1, columns), len(x))
        if grid.smoothing is not None:
            x = x / grid.smoothing
        if grid.per_token:
            scale = mx.maximum(mx.abs(x).max(axis=1, keepdims=True) / limit, SMALLEST)
        spoilt = mx.isnan(x).any(axis=1, keepdims=True)
        codes = mx.where(spoilt, 0, mx.clip(mx.round(x / scale), -limit, limit))
        return Codes(codes, mx.where(spoilt, mx.nan, mx.broadcast_to(scale, spoilt.shape)))

    def quantize_modulated(self, x: mx.array, modulation: Modulation, grid: InputGrid) -> Codes:
        """All in float32, as a kernel does it."""
        self.normalized += 1
        assert modulation.fits(x)
        scale, shift = (v.astype(mx.float32)[:, None] for v in (modulation.scale, modulation.shift))
        normal = mx.fast.layer_norm(x.astype(mx.float32), None, None, modulation.eps)
        return self.quantize(normal * (1 + scale) + shift, grid)

    def merged(self, operands: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        if not self.merges:
            return None
        codes, scales = (mx.concatenate([o[k] for o in operands]) for k in ("codes", "scales"))
        mx.eval(codes, scales)
        end = 0
        for operand in operands:
            operand["begin"], operand["end"] = end, (end := end + len(operand["codes"]))
            operand["codes"] = codes
        return {"own": True, "codes": codes, "scales": scales}

    def bias_table(self, operand: dict[str, Any], biases: mx.array) -> mx.array:
        return biases

    def product(
        self,
        codes: Codes,
        operand: dict[str, Any],
        dtype: mx.Dtype,
        columns: mx.array | None = None,
    ) -> mx.array:
        self.multiplied += 1
        weight = operand["codes"][operand.get("begin") : operand.get("end")]
        y = codes.values @ weight.T * (codes.scales * operand["scales"][:, 0])
        return (y if columns is None else y + columns).astype(dtype)

    def product_added(
        self,
        codes: Codes,
        operand: dict[str, Any],
        residual: mx.array,
        gate: mx.array,
        columns: mx.array | None = None,
    ) -> mx.array:
        self.added += 1
        assert gate.dtype == residual.dtype
        y = self.product(codes, operand, mx.float32, columns).reshape(residual.shape)
        total = residual.astype(mx.float32) + gate.astype(mx.float32)[:, None] * y
        return total.astype(residual.dtype)

    def input_table(
        self, shifts: mx.array | None, smoothing: mx.array | None, columns: int
    ) -> mx.array:
        shifts = mx.zeros((1, columns)) if shifts is None else shifts
        factor = mx.ones((columns,)) if smoothing is None else 1 / smoothing
        return mx.concatenate([mx.broadcast_to(factor, shifts.shape), -shifts * factor], axis=1)

    def following(self, row: mx.array, scale: mx.array, limit: mx.array) -> Following:
        assert scale.shape == limit.shape == (1,)
        return Following(*mx.split(row / scale, 2), scale, limit)

    def product_gelu(
        self,
        codes: Codes,
        operand: dict[str, Any],
        following: Following,
        columns: mx.array | None = None,
    ) -> Codes:
        self.chained += 1
        hidden = nn.gelu_approx(self.product(codes, operand, mx.float32, columns))
        spoilt = mx.isnan(hidden).any(axis=1, keepdims=True)
        values = mx.round(hidden * following.factor + following.term)
        values = mx.where(spoilt, 0, mx.clip(values, -following.limit, following.limit))
        return Codes(values, mx.where(spoilt, mx.nan, following.scale))


def entries_of(values: mx.array, rows: int) -> mx.array:
    """One for each row, of one for each part of the batch."""
    return mx.repeat(values, rows // len(values), axis=0)

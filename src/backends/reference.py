"""Codes multiplied in float32, unpacked anew at every call: what the others are measured by."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .weight import EXACT_BELOW, Weight, exact_columns, rescaled, unpack

INT32_PARTS = 2**31 // EXACT_BELOW - 1  # whose sums, up to EXACT_BELOW each, 32 bits can hold


class Reference:
    name = "reference"

    def prepare(self, weight: Weight, dtype: mx.Dtype, largest: int | None) -> dict[str, Any]:
        """What `multiply` needs; x will hold codes up to `largest`, or floats (None)."""
        return {"packed": weight.packed, "scales": weight.scales, "step": step(weight, largest)}

    def multiply(self, x: mx.array, factor: mx.array | None, operand: dict[str, Any]) -> mx.array:
        """(…, rows) float32; with a factor x holds codes, without one floats."""
        packed, scales = operand["packed"], operand["scales"]
        codes = unpack(packed, 32 * packed.shape[1] // x.shape[-1])
        return product(x.astype(mx.float32), split(codes, operand["step"]), scales, factor)


def step(weight: Weight, largest: int | None) -> int:
    """How many columns are summed at once: those of a group, or as many as float32 sums exactly."""
    if weight.groups > 1 or largest is None:
        return weight.columns // weight.groups
    return min(weight.columns, exact_columns(weight.bits, largest))


def product(
    x: mx.array, parts: list[mx.array], scales: mx.array, factor: mx.array | None
) -> mx.array:
    """Parts' sums, put together: weighted by their scales, or added up and then scaled."""
    if scales.shape[1] > 1:
        return grouped_sum(x, parts, scales, factor)
    return rescaled(summed(x, parts), scales[:, 0], factor)


def split(codes: mx.array, columns: int) -> list[mx.array]:
    """The codes, at most so many columns at a time, each part transposed."""
    starts = range(0, codes.shape[1], columns)
    return [mx.contiguous(codes[:, start : start + columns]).T for start in starts]


def summed(x: mx.array, parts: list[mx.array]) -> mx.array:
    """x·codes; each part's sum is exact in float32, and so is the total, as nearly as it fits."""
    if len(parts) == 1:
        return x @ parts[0]
    sums = part_sums(x, parts)
    whole = mx.int32 if len(parts) <= INT32_PARTS else mx.int64
    total = sum(part.astype(whole) for part in sums).astype(mx.float32)
    # An integer cannot be NaN, so a row that is not a number keeps its float total.
    rough = sum(sums)
    return mx.where(mx.isnan(rough), rough, total)


def grouped_sum(
    x: mx.array, parts: list[mx.array], scales: mx.array, factor: mx.array | None
) -> mx.array:
    """factor·Σ over the groups of scale times the group's own sum, one after the other."""
    total = sum(
        part.astype(mx.float32) * scales[:, group] for group, part in enumerate(part_sums(x, parts))
    )
    return total if factor is None else total * factor


def part_sums(x: mx.array, parts: list[mx.array]) -> list[mx.array]:
    sums, start = [], 0
    for part in parts:
        sums.append(x[..., start : start + len(part)] @ part)
        start += len(part)
    return sums

"""Codes unpacked anew at every call, then one matrix product: the memory of codes, and nearly the
time of floats, since unpacking reads a weight once and a product of many rows takes far longer."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .reference import product, split, step
from .weight import Weight, product_dtype, sixteen_bit_unit, unpack

SMALLEST = 1e-30  # that a row's largest scale is taken for, to divide by


class Unpack:
    name = "unpack"

    def prepare(self, weight: Weight, dtype: mx.Dtype, largest: int | None) -> dict[str, Any]:
        """Nothing but the codes as they are held: packed, or a byte each.

        In 16 bits a product is rounded once, after the sum. Scales of groups go into the codes
        there, as shares of their row's largest, so that one product is enough.
        """
        dtype = product_dtype(dtype, largest)
        held, scales = getattr(weight, "bytes", None), weight.scales
        operand = {"codes": weight.packed if held is None else held, "dtype": dtype}
        if dtype == mx.float32:
            return {**operand, "scales": scales, "unit": 1.0, "step": step(weight, largest)}
        unit = sixteen_bit_unit(weight, largest)
        if weight.groups > 1:
            row = mx.maximum(mx.abs(scales).max(axis=1, keepdims=True), SMALLEST)
            operand["inside"], scales = unit * scales / row, row
        return {**operand, "scales": scales / unit, "unit": unit, "step": weight.columns}

    def multiply(self, x: mx.array, factor: mx.array | None, operand: dict[str, Any]) -> mx.array:
        """(…, rows) float32; with a factor x holds codes, without one floats."""
        codes, unit, dtype = (operand[name] for name in ("codes", "unit", "dtype"))
        if codes.dtype != mx.int8:
            codes = unpack(codes, 32 * codes.shape[1] // x.shape[-1], dtype)
        if "inside" in operand:
            inside = operand["inside"]
            groups = codes.astype(mx.float32).reshape(*inside.shape, -1)
            codes = (groups * inside[..., None]).reshape(len(codes), -1)
        codes = codes.astype(dtype)
        if unit != 1 and "inside" not in operand:
            codes = codes * unit
        parts = split(codes, operand["step"])
        return product(x.astype(dtype), parts, operand["scales"], factor)

"""Codes unpacked once, one matrix product: fast wherever float products are."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .reference import product, split, step
from .weight import Weight, product_dtype, sixteen_bit_unit


class Dense:
    name = "dense"

    def prepare(self, weight: Weight, dtype: mx.Dtype, largest: int | None) -> dict[str, Any]:
        """Codes in `dtype`; in 16 bits, products are rounded once, after the sum."""
        dtype = product_dtype(dtype, largest)
        codes, scales, columns = weight.codes(dtype), weight.scales, step(weight, largest)
        if dtype != mx.float32:
            unit = sixteen_bit_unit(weight, largest)
            codes, scales = codes * unit, scales / unit
            columns = weight.columns // weight.groups  # parts would be rounded one by one
        operand = {"codes": split(codes, columns), "scales": scales}
        mx.eval(operand)
        return operand

    def multiply(self, x: mx.array, factor: mx.array | None, operand: dict[str, Any]) -> mx.array:
        """(…, rows) float32; with a factor x holds codes, without one floats."""
        parts = operand["codes"]
        return product(x.astype(parts[0].dtype), parts, operand["scales"], factor)

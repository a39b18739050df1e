"""Quantization in floats: codes are scaled back before one ordinary product."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..backends import Weight
from ..quant.grid import dequantize


class Simulated:
    """What is done where there is no kernel for codes: the errors of quantization at the cost of
    floats, and of quantizing the input on top."""

    name = "simulated"

    def prepare(self, weight: Weight, dtype: mx.Dtype, largest: int | None) -> dict[str, Any]:
        """The weight in `dtype`, with its scales."""
        operand = {"weight": dequantize(weight.codes(), weight.scales).astype(dtype)}
        mx.eval(operand)
        return operand

    def multiply(self, x: mx.array, factor: mx.array | None, operand: dict[str, Any]) -> mx.array:
        """(…, rows) float32; with a factor x holds codes, without one floats."""
        weight = operand["weight"]
        x = x if factor is None else x * factor
        return (x.astype(weight.dtype) @ weight.T).astype(mx.float32)

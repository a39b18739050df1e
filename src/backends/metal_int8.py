"""Products of 8-bit integers on Apple GPUs, from M5 on, by Metal Performance Primitives' matmul2d.

Before the first product a self-test runs, once a machine. Where it fails, on older machines, for
floats, scales of groups or widths that are no whole tiles, another backend multiplies instead:
never a wrong number.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from . import cuda_int8
from . import metal_int8_kernels as kernels
from .dense import Dense
from .device import M5, Device
from .fusing import InputGrid, multiply_codes
from .metal_int8_check import Machine, record, self_test, unsuited
from .metal_int8_kernels import TILE, Codes
from .quantized_matmul import QuantizedMatmul
from .unpack import Unpack
from .weight import Weight

DEPTH_STEP = 32  # columns that matmul2d takes at once
FALLBACKS = {backend.name: backend for backend in (Dense(), QuantizedMatmul(), Unpack())}


def usable() -> bool:
    """Whether there are kernels here that pass their self-test."""
    machine = Machine.here()
    return not unsuited(machine) and not self_test(machine)


def status() -> str:
    """One line for `ditq doctor`."""
    machine = Machine.here()
    if why := unsuited(machine):
        return f"not used: {why}"
    if wrong := self_test(machine):
        failed = f"self-test failed on {machine.architecture}: {wrong}"
        return f"not used: {failed}; {record(machine).way_out}"
    return f"matmul2d on {machine.architecture}, self-test passed"


def fits(outputs: int, columns: int) -> bool:
    """Whether a weight of that shape is one of whole tiles."""
    return outputs % TILE == 0 and columns % DEPTH_STEP == 0


def takes(outputs: int, columns: int) -> bool:
    """Whether these kernels multiply by a weight of that shape here."""
    return fits(outputs, columns) and usable()


def refusal(weight: Weight, largest: int | None) -> str:
    """Why such a product is none of whole 8-bit numbers in whole tiles; empty if it is."""
    outputs = len(weight.scales)
    if not fits(outputs, weight.columns):
        return f"{outputs} outputs of {weight.columns} columns are no whole tiles"
    return cuda_int8.refusal(weight, largest)


def fallback(weight: Weight) -> str:
    """Name of the backend that multiplies instead."""
    if hasattr(weight, "bytes"):  # a byte a weight, held elsewhere: nothing is kept of it
        return "unpack"
    device = Device.here()
    return "quantized_matmul" if device.kind == "metal" and device.generation >= M5 else "dense"


class MetalInt8:
    """Weights lie as int8, row by row, as the layers hold them that have them in bytes."""

    name = "metal_int8"

    def prepare(self, weight: Weight, dtype: mx.Dtype, largest: int | None) -> dict[str, Any]:
        """Arrays, and the name of what multiplies them where these kernels do not."""
        if refusal(weight, largest) or not usable():
            name = fallback(weight)
            return {"fallback": name, **FALLBACKS[name].prepare(weight, dtype, largest)}
        scales = weight.scales[:, 0]
        if hasattr(weight, "bytes"):
            return {"bytes": weight, "scales": scales}
        operand = {"codes": weight.codes(mx.int8), "scales": scales}
        mx.eval(operand)
        return operand

    def multiply(self, x: mx.array, factor: mx.array | None, operand: dict[str, Any]) -> mx.array:
        """(…, rows) float32; with a factor x holds codes, without one floats."""
        if "fallback" in operand:
            return FALLBACKS[operand["fallback"]].multiply(x, factor, operand)
        return multiply_codes(self, x, factor, operand, cuda_int8.LARGEST_CODE)

    @staticmethod
    def fuses(operand: dict[str, Any]) -> bool:
        """Whether the methods below can be used with it."""
        return "fallback" not in operand

    @staticmethod
    def quantize(x: mx.array, grid: InputGrid) -> Codes:
        """Codes of (…, columns) floats, once for all the products that take them."""
        return kernels.quantize(x, grid)

    @staticmethod
    def bias_table(operand: dict[str, Any], biases: mx.array) -> mx.array:
        """The (steps, outputs) biases themselves, whose rows `product` takes."""
        return biases.reshape(-1, len(operand["scales"])).astype(mx.float32)

    @staticmethod
    def product(
        codes: Codes, operand: dict[str, Any], dtype: mx.Dtype, columns: mx.array | None = None
    ) -> mx.array:
        """(rows, outputs); `columns` is a row of a bias table, none adds no bias."""
        own = operand["codes"] if "codes" in operand else operand["bytes"].codes(mx.int8)
        return kernels.multiply(codes, own, operand["scales"], columns, dtype)

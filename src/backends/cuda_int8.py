"""Products of 8-bit integers on NVIDIA GPUs, from sm_80 on; what they cannot do is done elsewhere.

Before the first product a self-test runs, once a machine. Where it fails, on another device, for
floats or for scales of groups, `dense` and `unpack` multiply instead: never a wrong number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from . import cuda_int8_kernels as kernels
from .cuda_int8_check import record, self_test
from .cuda_int8_kernels import UNPACKED_BITS, Codes, Following
from .cuda_int8_source import MMA, NARROW, WGMMA, Variant
from .dense import Dense
from .device import HOPPER, Device
from .fusing import InputGrid, Modulation, check_depth, multiply_codes
from .unpack import Unpack
from .weight import Weight

OLDEST = 80  # as `Device` counts generations
LARGEST_CODE = 127
INT32_BELOW = 2**31
INPUT_DTYPES = (mx.float16, mx.bfloat16, mx.float32, mx.int8)
VARIANTS = {variant.name: variant for variant in (WGMMA, NARROW, MMA)}
FALLBACKS = {backend.name: backend for backend in (Dense(), Unpack())}


def suited(device: Device) -> Variant | None:
    """The kernel for a device; wgmma is Hopper's alone."""
    if device.kind != "cuda" or device.generation < OLDEST:
        return None
    return WGMMA if device.generation == HOPPER else MMA


def usable() -> Variant | None:
    """The kernel that multiplies here, none where there is none that passes its self-test."""
    variant = suited(Device.here())
    return None if variant is None or self_test(variant) else variant


def status() -> str:
    """One line for `ditq doctor`."""
    device = Device.here()
    if device.kind != "cuda":
        return "not used: MLX does not compute on a CUDA device"
    variant, name = suited(device), f"sm_{device.generation}"
    if variant is None:
        return f"not used: {name} is older than sm_80"
    if why := failure(variant, name):
        return why
    passed = f"{variant.name} on {name}, self-test passed"
    why = failure(NARROW, name) if variant is WGMMA else ""
    return f"{passed}; {NARROW.name} {why}" if why else passed


def failure(variant: Variant, name: str) -> str:
    """Why a kernel is not used on the device of that name, and the way out; empty if it is."""
    wrong = self_test(variant)
    failed = f"not used: self-test of {variant.name} failed on {name}: {wrong}"
    return f"{failed}; {record(variant).way_out}" if wrong else ""


def refusal(weight: Weight, largest: int | None) -> str:
    """Why such a product is none of whole 8-bit numbers; empty if it is."""
    if largest is None or largest > LARGEST_CODE:
        return "inputs are floats" if largest is None else f"codes up to {largest}"
    if weight.groups > 1:
        return "scales of groups"
    if weight.columns * largest * 2 ** (weight.bits - 1) >= INT32_BELOW:
        return f"sums of {weight.columns} columns do not fit in 32 bits"
    return ""


@dataclass(frozen=True)
class Part:
    """Where a weight's tiles lie among those of several; no array, so that they count once."""

    whole: dict[str, Any]  # the operand of all
    begin: int
    end: int

    @property
    def tiles(self) -> mx.array:
        return self.whole["tiles"][self.begin : self.end]


class CudaInt8:
    """Weights lie as int8 in tiles; `keeps_packed` unpacks them anew at every call instead."""

    def __init__(self, keeps_packed: bool = False) -> None:
        self.keeps_packed = keeps_packed
        self.name = "cuda_int8_packed" if keeps_packed else "cuda_int8"

    def prepare(self, weight: Weight, dtype: mx.Dtype, largest: int | None) -> dict[str, Any]:
        """Arrays, and the names of what multiplies them."""
        lent = hasattr(weight, "bytes")  # a byte a weight, held elsewhere: nothing is kept of it
        keeps = not (lent or self.keeps_packed)
        if refusal(weight, largest) or (variant := usable()) is None:
            fallback = "dense" if keeps else "unpack"
            return {"fallback": fallback, **FALLBACKS[fallback].prepare(weight, dtype, largest)}
        operand = named_kernels(variant, weight.scales[:, 0], weight.columns)
        if lent:
            return {**operand, "bytes": weight}
        if self.keeps_packed and weight.bits in UNPACKED_BITS:
            return {**operand, "packed": weight.packed, "bits": weight.bits}
        operand["tiles"] = kernels.weight_tiles(weight)
        mx.eval(operand["tiles"], operand["columns"])
        return operand

    def multiply(self, x: mx.array, factor: mx.array | None, operand: dict[str, Any]) -> mx.array:
        """(…, rows) float32; with a factor x holds codes, without one floats."""
        if "fallback" in operand:
            return FALLBACKS[operand["fallback"]].multiply(x, factor, operand)
        return multiply_codes(self, x, factor, operand, LARGEST_CODE)

    @staticmethod
    def merged(operands: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """Tiles side by side: for weights that are kept in whole ones, of the same depth."""
        if not all("tiles" in operand for operand in operands):
            return None
        parts = [operand["tiles"] for operand in operands]
        widths = [len(operand["scales"]) for operand in operands]
        if any(width != kernels.padded(width) for width in widths):
            return None
        if len({operand["depth"] for operand in operands}) > 1:
            return None
        scales = mx.concatenate([operand["scales"] for operand in operands])
        first = operands[0]
        found = named_kernels(VARIANTS[first["kernel"]], scales, first["depth"])
        found["tiles"] = mx.concatenate(parts)
        mx.eval(found["tiles"], found["scales"], found["columns"])
        end = 0
        for operand, part in zip(operands, parts, strict=True):
            del operand["tiles"]
            operand["part"] = Part(found, end, (end := end + len(part)))
        return found

    @staticmethod
    def fuses(operand: dict[str, Any]) -> bool:
        """Whether the methods below can be used with it."""
        return "fallback" not in operand

    def quantize(self, x: mx.array, grid: InputGrid) -> Codes:
        """Codes of (…, columns) floats, once for all the products that take them."""
        return kernels.quantize(known(x), grid)

    @staticmethod
    def quantize_modulated(x: mx.array, modulation: Modulation, grid: InputGrid) -> Codes:
        """Codes of the modulated layer norm of (batch, tokens, columns) floats."""
        return kernels.quantize_modulated(x, modulation, grid)

    @staticmethod
    def bias_table(operand: dict[str, Any], biases: mx.array) -> mx.array:
        """(steps, numbers) of (steps, outputs) biases, whose rows `product` takes."""
        return kernels.column_table(operand["scales"], biases)

    @staticmethod
    def input_table(shifts: mx.array | None, smoothing: mx.array | None, columns: int) -> mx.array:
        """(steps, numbers) of (steps, columns) shifts, whose rows `following` takes."""
        return kernels.input_table(shifts, smoothing, columns)

    @staticmethod
    def following(row: mx.array, scale: mx.array, limit: mx.array) -> Following:
        """The grid of the input behind `product_gelu`; scale and limit are (1,)."""
        return Following(row, scale, limit)

    def product(
        self,
        codes: Codes,
        operand: dict[str, Any],
        dtype: mx.Dtype,
        columns: mx.array | None = None,
    ) -> mx.array:
        """(rows, outputs); `columns` is a row of `column_table`, none adds no bias."""
        weight = weight_of(codes, operand, columns)
        return kernels.multiply(codes, *weight, dtype, variant_of(operand, codes))

    def product_added(
        self,
        codes: Codes,
        operand: dict[str, Any],
        residual: mx.array,
        gate: mx.array,
        columns: mx.array | None = None,
    ) -> mx.array:
        """residual + gate · product, in the residual's shape and dtype."""
        weight = weight_of(codes, operand, columns)
        return kernels.multiply_added(codes, *weight, residual, gate, variant_of(operand, codes))

    def product_gelu(
        self,
        codes: Codes,
        operand: dict[str, Any],
        following: Following,
        columns: mx.array | None = None,
    ) -> Codes:
        """The product through GELU, quantized for the next."""
        weight = weight_of(codes, operand, columns)
        return kernels.multiply_gelu(codes, *weight, following, variant_of(operand, codes))

    def linear(
        self,
        x: mx.array,
        grid: InputGrid,
        operand: dict[str, Any],
        columns: mx.array | None = None,
    ) -> mx.array:
        """A whole quantized linear in two kernels: (…, columns) to (…, outputs), in x's dtype."""
        shape = (*x.shape[:-1], len(operand["scales"]))
        if x.size == 0:
            return mx.zeros(shape, dtype=x.dtype)
        return self.product(self.quantize(x, grid), operand, x.dtype, columns).reshape(shape)


def named_kernels(variant: Variant, scales: mx.array, depth: int) -> dict[str, Any]:
    """What an operand says of these outputs, whatever its weight is kept as."""
    found = {"kernel": variant.name, "scales": scales, "depth": depth}
    found["columns"] = kernels.column_table(scales)[0]
    if variant is WGMMA and NARROW.fits(len(scales)) and not self_test(NARROW):
        found["narrow"] = NARROW.name
    return found


def variant_of(operand: dict[str, Any], codes: Codes) -> Variant:
    """The kernel for that many rows."""
    variant, width = VARIANTS[operand["kernel"]], len(operand["scales"])
    narrow = (
        variant is WGMMA and "narrow" in operand and kernels.narrow_is_faster(codes.rows, width)
    )
    return VARIANTS[operand["narrow"]] if narrow else variant


def weight_of(
    codes: Codes, operand: dict[str, Any], columns: mx.array | None
) -> tuple[mx.array, mx.array, mx.array]:
    """Tiles, scales and the column table, the weight's own where none is given, for these codes."""
    check_depth(codes.columns, operand["depth"])  # tiles know it by whole pieces only
    columns = operand["columns"] if columns is None else columns
    return tiles_of(operand), operand["scales"], columns


def tiles_of(operand: dict[str, Any]) -> mx.array:
    if "part" in operand:
        return operand["part"].tiles
    if "tiles" in operand:
        return operand["tiles"]
    if "bytes" in operand:
        return kernels.weight_tiles(operand["bytes"])
    return kernels.weight_tiles(
        Weight(operand["packed"], operand["scales"][:, None], operand["bits"])
    )


def known(x: mx.array) -> mx.array:
    """In a dtype that the quantizer reads."""
    return x if x.dtype in INPUT_DTYPES else x.astype(mx.float32)

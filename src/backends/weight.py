"""A weight as codes in MLX's own packing, and what all backends do with it alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

from ..errors import UserError

MLX_BITS = (2, 3, 4, 5, 6, 8)  # that mx.quantize packs
MLX_GROUP_SIZES = (128, 64, 32)  # of columns that share a scale there
PACKED_COLUMNS = 32  # codes that share whole words at any number of bits
EXACT_BELOW = 2**24  # float32 holds every whole number up to here
HALF_BELOW = 2**15  # a power of two that float16 holds with room to spare


@dataclass(frozen=True)
class Weight:
    """W ≈ scales·codes: codes (rows, columns) packed into uint32, each raised by 2^(bits-1)."""

    packed: mx.array  # (rows, columns·bits/32) uint32
    scales: mx.array  # (rows, groups) float32
    bits: int

    def __post_init__(self) -> None:
        check_mlx_bits(self.bits)
        if self.columns % self.scales.shape[1]:
            raise UserError(
                f"{self.scales.shape[1]} groups of scales do not divide {self.columns} columns"
            )

    @property
    def columns(self) -> int:
        return self.packed.shape[1] * 32 // self.bits

    @property
    def groups(self) -> int:
        return self.scales.shape[1]

    def codes(self, dtype: mx.Dtype = mx.float32) -> mx.array:
        """(rows, columns), whole numbers that every float dtype holds exactly."""
        return unpack(self.packed, self.bits).astype(dtype)


def group_size(columns: int, largest: int = max(MLX_GROUP_SIZES)) -> int:
    """The largest of MLX's group sizes that divides the columns, several times if any does.

    On Hopper MLX has a kernel of its own for inputs of a single group, compiled when it is first
    used, with headers that its packages do not bring.
    """
    fitting = [size for size in MLX_GROUP_SIZES if size <= largest and columns % size == 0]
    return next((size for size in fitting if size < columns), fitting[0])


def check_mlx_bits(bits: int) -> None:
    if bits not in MLX_BITS:
        raise UserError(f"{bits} bits cannot be packed; valid: {', '.join(map(str, MLX_BITS))}")


def unpack(packed: mx.array, bits: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """(rows, columns) codes of packed ones in a float dtype; all of them hold these exactly."""
    ones = mx.ones((packed.shape[0], packed.shape[1] // bits), dtype=dtype)
    offset = -float(2 ** (bits - 1))
    return mx.dequantize(packed, ones, offset * ones, group_size=PACKED_COLUMNS, bits=bits)


def rescaled(sums: mx.array, scale: mx.array, factor: mx.array | None) -> mx.array:
    """float32 sums times the rows' scales, and the factor where x held codes."""
    return sums.astype(mx.float32) * (scale if factor is None else factor * scale)


def exact_columns(bits: int, largest: int) -> int:
    """How many columns float32 can sum without an error, for inputs up to `largest`."""
    return max(1, (EXACT_BELOW - 1) // (2 ** (bits - 1) * largest))


def product_dtype(dtype: mx.Dtype, largest: int | None) -> mx.Dtype:
    """What products are taken in: whole numbers in float16 rather than bfloat16, which has three
    bits less and which GPUs before M3 do not have; `sixteen_bit_unit` keeps them in its range."""
    return mx.float16 if dtype == mx.bfloat16 and largest is not None else dtype


def sixteen_bit_unit(weight: Weight, largest: int | None) -> float:
    """A power of two by which codes are multiplied so that no 16-bit sum overflows.

    Powers of two change no digit. Sums of whole numbers up to `largest` are bounded; those of
    floats (none) are brought near the output's own size, by the largest scale.
    """
    if largest is not None:
        bound = 2 ** (weight.bits - 1) * largest * (weight.columns // weight.groups)
        return 2.0 ** min(0, math.floor(math.log2(HALF_BELOW / bound)))
    largest_scale = float(weight.scales.max())
    return 2.0 ** max(-14, math.floor(math.log2(largest_scale))) if largest_scale > 0 else 1.0

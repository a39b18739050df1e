"""Codes and MLX's affine packing: w = scale·q + bias, at b bits with q = code + 2^(b-1).

At 4 bits that is q = code + 8 and bias = −8·scale: what mx.quantized_matmul and nn.QuantizedLinear
read.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..backends.weight import (
    MLX_GROUP_SIZES,
    PACKED_COLUMNS,
    Weight,
    check_mlx_bits,
    group_size,
    unpack,
)
from ..errors import UserError
from .grid import code_range


def pack_codes(codes: mx.array | np.ndarray, bits: int) -> mx.array:
    """(rows, columns) codes as (rows, columns·bits/32) uint32, a stream of bits, lowest first."""
    check_mlx_bits(bits)
    codes = np.array(codes)
    rows, columns = codes.shape
    if columns % PACKED_COLUMNS:
        raise UserError(f"{columns} columns cannot be packed; valid: multiples of {PACKED_COLUMNS}")
    low, high = code_range(bits)
    if codes.size and (codes.min() < low or codes.max() > high):
        raise UserError(
            f"codes from {codes.min()} to {codes.max()} do not fit in {bits} bits; "
            f"valid: {low} to {high}"
        )
    groups = (codes.astype(np.int32) - low).astype(np.uint32)
    groups = groups.reshape(rows, columns // PACKED_COLUMNS, PACKED_COLUMNS)
    words = np.zeros((*groups.shape[:2], bits), dtype=np.uint32)
    for place in range(PACKED_COLUMNS):
        word, offset = divmod(place * bits, 32)
        words[..., word] |= groups[..., place] << np.uint32(offset)
        if offset + bits > 32:
            words[..., word + 1] |= groups[..., place] >> np.uint32(32 - offset)
    return mx.array(words.reshape(rows, -1))


def unpack_codes(packed: mx.array, bits: int) -> mx.array:
    """(rows, columns) int8 codes of packed ones."""
    check_mlx_bits(bits)
    return unpack(packed, bits).astype(mx.int8)


def to_affine(
    codes: mx.array | np.ndarray, scale: mx.array | np.ndarray, bits: int
) -> tuple[mx.array, mx.array, mx.array, int]:
    """Packed codes, scales, biases and the group size, as mx.quantized_matmul takes them.

    `scale` is (rows, groups); one for the whole row is repeated for each of MLX's groups.
    """
    weight = Weight(pack_codes(codes, bits), mx.array(scale).astype(mx.float32), bits)
    return weight.packed, *affine_scales(weight)


def affine_scales(weight: Weight) -> tuple[mx.array, mx.array, int]:
    """Scales, biases and the group size that MLX reads packed codes with, float32."""
    scale, columns = weight.scales, weight.columns
    size = columns // weight.groups
    if weight.groups == 1:
        size = group_size(columns)
        scale = mx.repeat(scale, columns // size, axis=1)
    if size not in MLX_GROUP_SIZES:
        valid = ", ".join(map(str, sorted(MLX_GROUP_SIZES)))
        raise UserError(f"groups of {size} of {columns} columns are not MLX's; valid: {valid}")
    return scale, -(2 ** (weight.bits - 1)) * scale, size


def from_affine(
    packed: mx.array, scales: mx.array, biases: mx.array, bits: int
) -> tuple[mx.array, mx.array]:
    """int8 codes and (rows, groups) float32 scales; equal scales of a row become one.

    Weights that are not on a grid around zero (bias = −2^(bits-1)·scale) are an error.
    """
    codes = unpack_codes(packed, bits)
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    if not mx.array_equal(biases, -(2 ** (bits - 1)) * scales):
        raise UserError(
            f"these weights have biases other than −{2 ** (bits - 1)}·scale: they are not codes "
            "around zero; quantize the model with this package"
        )
    if bool((scales == scales[:, :1]).all()):
        scales = scales[:, :1]
    return codes, scales

"""The source of the integer kernels for NVIDIA GPUs: files, and what is generated around them.

Each kernel is compiled when it is first used, for the device that it runs on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..store import hash_file

FOLDER = Path(__file__).resolve().parent / "cuda"
PIECE = 128  # rows, and codes along the depth, of a piece of a tile
CHUNK = 16  # codes that a thread of the quantizers has at once
WIDE = 256  # columns that the Hopper kernel takes at once, to which weights are padded
ROWS_PER_BLOCK, QUANTIZE_THREADS = 8, 256


@dataclass(frozen=True)
class Variant:
    """One of the two matrix kernels."""

    name: str
    file: str
    threads: int
    shared_memory: int  # bytes, with room to align them
    columns: int  # of a tile
    persistent: bool
    multiple: int = 1  # of which a product's outputs must be

    def fits(self, width: int) -> bool:
        """Whether that many outputs end with a whole tile, where it wants that."""
        return width % self.multiple == 0


WGMMA = Variant("wgmma", "multiply_sm90", 384, 4 * 48 * 1024 + 1024, WIDE, True)
NARROW = Variant("wgmma_192", "multiply_sm90", 384, 4 * 40 * 1024 + 1024, 192, True, 384)
MMA = Variant("mma", "multiply_sm80", 256, 3 * 32 * 1024 + 1024, PIECE, False)


def included(*names: str) -> str:
    """The files as a kernel's header has them. By name, since MLX reads a kernel's whole source at
    every call: all of it would take longer than starting the kernel. The digest is there so that
    another content is another source."""
    files = [FOLDER / f"{name}.cu" for name in names]
    return "".join(f'#include "{file}" // {hash_file(file)[:16]}\n' for file in files)


def wgmma_source(columns: int = WIDE) -> str:
    """The instruction that multiplies 64 rows by `columns`, 32 codes deep, as a function."""
    count = columns // 2  # sums of each thread
    sums = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+r"(sums[{i}])' for i in range(count))
    return f"""
namespace ditq {{

constexpr int WIDE = {columns};

// Adds to the sums, or overwrites them where `add` is 0.
__device__ __forceinline__ void wgmma(
    int (&sums)[{count}], unsigned long long rows, unsigned long long columns, int add) {{
  asm volatile(
      "{{\\n.reg .pred add;\\nsetp.ne.b32 add, %{count + 2}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{columns}k32.s32.s8.s8 {{{sums}}}, "
      "%{count}, %{count + 1}, add;\\n}}"
      : {operands}
      : "l"(rows), "l"(columns), "r"(add));
}}

}} // namespace ditq
"""


def multiply_header(variant: Variant) -> str:
    generated = "" if variant is MMA else wgmma_source(variant.columns)
    return included("tiles", "finish") + generated + included(variant.file)


def bounded(blocks: int) -> str:
    """The end of a quantizer's header: its registers must leave room for that many blocks."""
    return f"""
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__({QUANTIZE_THREADS}, {blocks})
"""


QUANTIZE = """
const int rows = x_shape[0] * x_shape[1], columns = x_shape[2];
const ditq::Lines<T> lines{x, x_strides[0], x_strides[1], x_strides[2], x_shape[1]};
const ditq::Grids grids{
    {given, given_strides[0]}, {limits, limits_strides[0]}, {shifts, shifts_strides[1]},
    {smoothing, smoothing_strides[0]}, shifts_strides[0], limits_shape[0], shifts_shape[0]};
if (ditq::in_chunks(lines, columns) && (!SHIFT || shifts_strides[1] == 1) &&
    (!SMOOTH || smoothing_strides[0] == 1))
  ditq::quantize_rows<true, TOKEN, SHIFT, SMOOTH>(lines, grids, codes, scales, rows, columns);
else
  ditq::quantize_rows<false, TOKEN, SHIFT, SMOOTH>(lines, grids, codes, scales, rows, columns);
"""
# All in float32, in one pass: `gains` and `offsets` are the modulation's scale and shift.
NORMALIZE = """
const int rows = x_shape[0] * x_shape[1];
const ditq::Lines<T> lines{x, x_strides[0], x_strides[1], x_strides[2], x_shape[1]};
const ditq::Lines<T> gain{
    gains, gains_strides[0], 0, gains_strides[1], rows / gains_shape[0]};
const ditq::Lines<T> offset{
    offsets, offsets_strides[0], 0, offsets_strides[1], rows / offsets_shape[0]};
if (x_shape[2] % ditq::CHUNK == 0 && lines.in_words() && gain.in_words() && offset.in_words())
  ditq::normalize_rows<true, HELD, TOKEN, SHIFT, SMOOTH>(
      lines, gain, offset, given, limits, shifts, smoothing, codes, scales, rows, x_shape[2],
      limits_shape[0], shifts_shape[0], EPSILON);
else
  ditq::normalize_rows<false, HELD, TOKEN, SHIFT, SMOOTH>(
      lines, gain, offset, given, limits, shifts, smoothing, codes, scales, rows, x_shape[2],
      limits_shape[0], shifts_shape[0], EPSILON);
"""
UNPACK = """
ditq::unpack_weight<BITS>(packed, tiles, packed_shape[0], packed_shape[1]);
"""
# The weight's own scales are given for their number alone.
MULTIPLY = """
const int rows = row_scales_shape[0], width = weight_scales_shape[0];
const ditq::ToFloats<T> finish{
    row_scales, reinterpret_cast<const float4*>(columns), y, rows, width};
ditq::multiply(
    a, b, (rows + 127) / 128, (width + TILE - 1) / TILE, b_shape[1], finish);
"""
MULTIPLY_GELU = """
const int rows = row_scales_shape[0], width = weight_scales_shape[0];
const ditq::ToCodes finish{
    row_scales, reinterpret_cast<const float4*>(columns), reinterpret_cast<const float4*>(next), y,
    scales, scale[0], 1.0f / scale[0], limit[0], rows, (width + 127) / 128};
ditq::multiply(
    a, b, (rows + 127) / 128, (width + TILE - 1) / TILE, b_shape[1], finish);
"""
MULTIPLY_ADDED = """
const int rows = row_scales_shape[0], width = weight_scales_shape[0];
const int row_tiles = (rows + 127) / 128, column_tiles = (width + TILE - 1) / TILE;
const ditq::ToFloats<T> product{
    row_scales, reinterpret_cast<const float4*>(columns), y, rows, width};
const ditq::Lines<T> lines{
    residual, residual_strides[0], residual_strides[1], residual_strides[2], residual_shape[1]};
const ditq::Lines<T> gate{gates, gates_strides[0], 0, gates_strides[1], rows / gates_shape[0]};
if (ditq::in_words(product, lines, gate))
  ditq::multiply(
      a, b, row_tiles, column_tiles, b_shape[1],
      ditq::ToSum<T, sizeof(T) == 2>{product, lines, gate});
else
  ditq::multiply(
      a, b, row_tiles, column_tiles, b_shape[1], ditq::ToSum<T, false>{product, lines, gate});
"""
OPERANDS = ("a", "b", "row_scales", "weight_scales", "columns")


@lru_cache
def quantize_kernel() -> Any:
    return mx.fast.cuda_kernel(
        name="ditq_quantize",
        input_names=["x", "given", "limits", "shifts", "smoothing"],
        output_names=["codes", "scales"],
        source=QUANTIZE,
        header=included("tiles", "quantize") + bounded(3),
        ensure_row_contiguous=False,  # a split along the tokens is read where it lies
    )


@lru_cache
def normalize_kernel(eps: float, held: int) -> Any:
    return mx.fast.cuda_kernel(
        name="ditq_normalize",
        input_names=["x", "gains", "offsets", "given", "limits", "shifts", "smoothing"],
        output_names=["codes", "scales"],
        source=f"constexpr float EPSILON = {float(eps)!r}f;{NORMALIZE}",
        header=included("tiles", "quantize", "normalize") + bounded(1 + (held <= 3)),
        ensure_row_contiguous=False,  # parts of larger arrays are read where they lie
    )


@lru_cache
def unpack_kernel() -> Any:
    return mx.fast.cuda_kernel(
        name="ditq_unpack",
        input_names=["packed"],
        output_names=["tiles"],
        source=UNPACK,
        header=included("tiles", "quantize"),
    )


@lru_cache
def multiply_kernel(variant: Variant) -> Any:
    return mx.fast.cuda_kernel(
        name=f"ditq_multiply_{variant.name}",
        input_names=list(OPERANDS),
        output_names=["y"],
        source=MULTIPLY,
        header=multiply_header(variant),
        shared_memory=variant.shared_memory,
    )


@lru_cache
def added_kernel(variant: Variant) -> Any:
    return mx.fast.cuda_kernel(
        name=f"ditq_added_{variant.name}",
        input_names=[*OPERANDS, "residual", "gates"],
        output_names=["y"],
        source=MULTIPLY_ADDED,
        header=multiply_header(variant),
        ensure_row_contiguous=False,
        shared_memory=variant.shared_memory,
    )


@lru_cache
def gelu_kernel(variant: Variant) -> Any:
    return mx.fast.cuda_kernel(
        name=f"ditq_gelu_{variant.name}",
        input_names=[*OPERANDS, "next", "scale", "limit"],
        output_names=["y", "scales"],
        source=MULTIPLY_GELU,
        header=multiply_header(variant),
        shared_memory=variant.shared_memory,
    )

"""Integer kernels for NVIDIA GPUs: what they are given, and how they are started.

Codes and weights lie in tiles (cuda/tiles.cu); rows, columns and depth are padded here, so any
shape is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .cuda_int8_source import (
    CHUNK,
    NARROW,
    PIECE,
    QUANTIZE_THREADS,
    ROWS_PER_BLOCK,
    WGMMA,
    WIDE,
    Variant,
    added_kernel,
    gelu_kernel,
    multiply_kernel,
    normalize_kernel,
    quantize_kernel,
    unpack_kernel,
)
from .fusing import InputGrid, Modulation, check_factors, is_per_entry, unfit
from .weight import Weight

UNPACK_THREADS = 256
UNPACKED_BITS = (4, 8)  # that a kernel unpacks
# More blocks than a device has multiprocessors would be right too, but slower. H100 and H200.
HOPPER_BLOCKS = 132


@dataclass(frozen=True)
class Codes:
    """Quantized rows; a row that held NaN has the scale NaN."""

    tiles: mx.array  # (row pieces, depth pieces, 128, 128) int8
    scales: mx.array  # (rows,) float32
    columns: int

    def times(self, factors: mx.array) -> Codes:
        """The same codes; each row's scale is so many times as large."""
        check_factors(factors, self.rows)
        return Codes(self.tiles, self.scales * factors, self.columns)

    @property
    def rows(self) -> int:
        return len(self.scales)


@dataclass(frozen=True)
class Following:
    """The grid of the next product's input, as the kernel that ends with it reads it."""

    table: mx.array  # (2·padded columns,) float32, a row of `input_table`
    scale: mx.array  # (1,) float32
    limit: mx.array  # (1,) float32


def pieces(size: int, of: int = PIECE) -> int:
    return -(-size // of)


def padded(size: int) -> int:
    """Columns of an output with those of its last, part-filled tile."""
    return WIDE * pieces(size, WIDE)


def quantize(x: mx.array, grid: InputGrid) -> Codes:
    """Codes of (…, columns) floats, or of int8 as they are, row by row."""
    x = x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
    batch, tokens, columns = x.shape
    rows = batch * tokens
    read = grid.arrays(rows, columns)
    tiles, scales = quantize_kernel()(
        inputs=[x, *read],
        template=[*grid.flags(), ("T", x.dtype)],
        **by_rows(rows, columns),
    )
    return Codes(tiles, scales[:rows], columns)


def quantize_modulated(x: mx.array, modulation: Modulation, grid: InputGrid) -> Codes:
    """Codes of the modulated layer norm of (batch, tokens, columns) floats, in one pass."""
    if not modulation.fits(x):
        arrays = x, modulation.scale, modulation.shift
        found = ", ".join(f"{v.shape} of {v.dtype}" for v in arrays)
        valid = "(batch, tokens, columns), twice (1 or batch, columns), all of one dtype"
        raise unfit("input, scale and shift", found, valid, "give one vector an entry of the batch")
    batch, tokens, columns = x.shape
    given = grid.arrays(batch * tokens, columns)
    read = (v if v.size == 1 else mx.contiguous(v) for v in given)
    held = pieces(columns, 32 * CHUNK)
    tiles, scales = normalize_kernel(modulation.eps, held)(
        inputs=[x, modulation.scale, modulation.shift, *read],
        template=[*grid.flags(), ("T", x.dtype), ("HELD", held)],
        **by_rows(batch * tokens, columns),
    )
    return Codes(tiles, scales[: batch * tokens], columns)


def by_rows(rows: int, columns: int) -> dict[str, Any]:
    """How a kernel is started that gives so many rows' codes and scales, a warp a row."""
    return {
        "output_shapes": [
            (pieces(rows), pieces(columns), PIECE, PIECE),
            (PIECE * pieces(rows),),
        ],
        "output_dtypes": [mx.int8, mx.float32],
        "grid": (pieces(rows) * (PIECE // ROWS_PER_BLOCK) * QUANTIZE_THREADS, 1, 1),
        "threadgroup": (QUANTIZE_THREADS, 1, 1),
    }


def weight_tiles(weight: Weight) -> mx.array:
    """(column pieces, depth pieces, 128, 128) int8 of a weight's codes, zeros around them."""
    rows, columns = len(weight.scales), weight.columns
    shape = (padded(rows) // PIECE, pieces(columns), PIECE, PIECE)
    if weight.bits not in UNPACKED_BITS:
        codes = mx.pad(weight.codes(mx.int8), ((0, padded(rows) - rows), (0, 0)))
        return quantize(codes, InputGrid.of_codes(PIECE)).tiles
    chunks = padded(rows) * pieces(columns) * (PIECE // 16)
    return unpack_kernel()(
        inputs=[weight.packed],
        template=[("BITS", weight.bits)],
        output_shapes=[shape],
        output_dtypes=[mx.int8],
        grid=(chunks, 1, 1),
        threadgroup=(UNPACK_THREADS, 1, 1),
    )[0]


def column_table(scales: mx.array, bias: mx.array | None = None) -> mx.array:
    """(steps, numbers) float32: what the kernel wants of each two columns, side by side.

    Of (steps, columns) biases; none is one step of zeros. Rows of it may be mixed as biases may.
    """
    bias = mx.zeros((1, len(scales))) if bias is None else bias.reshape(-1, len(scales))
    return pair_table(mx.broadcast_to(scales, bias.shape), bias)


def pair_table(first: mx.array, second: mx.array) -> mx.array:
    """(steps, 2·padded columns): two of the first, the two of the second, and so on."""
    steps, width = first.shape
    around = ((0, 0), (0, padded(width) - width))
    both = [mx.pad(v.astype(mx.float32), around).reshape(steps, -1, 1, 2) for v in (first, second)]
    return mx.concatenate(both, axis=2).reshape(steps, -1)


def input_table(shifts: mx.array | None, smoothing: mx.array | None, columns: int) -> mx.array:
    """(steps, numbers) float32: factors and terms of an input whose scale is 1, side by side."""
    shifts = mx.zeros((1, columns)) if shifts is None else shifts.reshape(-1, columns)
    factor = mx.ones((columns,)) if smoothing is None else 1 / smoothing
    return pair_table(mx.broadcast_to(factor, shifts.shape), -shifts * factor)


def following(grid: InputGrid, columns: int) -> Following:
    """Of a static grid with one entry; made once for all products at the same step."""
    grid.check(1, columns)
    table = input_table(grid.shift, grid.smoothing, columns)
    return Following(table[0], grid.scales, grid.limits)


def narrow_is_faster(rows: int, width: int) -> bool:
    """Whether a Hopper GPU, whose multiprocessors begin a tile together, is done sooner with tiles
    of fewer columns: where wide ones leave many without one in the last turn."""

    def turns(variant: Variant) -> int:
        tiles = pieces(rows) * pieces(width, variant.columns)
        return pieces(tiles, HOPPER_BLOCKS) * variant.columns

    return NARROW.fits(width) and turns(NARROW) < turns(WGMMA)


def launch(variant: Variant, rows: int, width: int) -> dict[str, Any]:
    tiles = pieces(rows) * pieces(width, variant.columns)
    blocks = min(tiles, HOPPER_BLOCKS) if variant.persistent else tiles
    return {"grid": (blocks * variant.threads, 1, 1), "threadgroup": (variant.threads, 1, 1)}


def check_product(
    codes: Codes, tiles: mx.array, weight_scales: mx.array, columns: mx.array
) -> None:
    """Raises unless these are of one product: the kernel goes by the weight's depth and outputs."""
    width = padded(len(weight_scales))
    wanted = (width // PIECE, codes.tiles.shape[1])
    if tiles.shape[:2] != wanted:
        way_out = "multiply codes as deep as the weight, and give its own scales"
        raise unfit("pieces of the weight's rows and depth", tiles.shape[:2], wanted, way_out)
    if columns.size != 2 * width:
        way_out = "take a row of a table of the same weight"
        raise unfit("numbers in the row of biases", columns.size, 2 * width, way_out)


def multiply(
    codes: Codes,
    tiles: mx.array,
    weight_scales: mx.array,
    columns: mx.array,
    dtype: mx.Dtype,
    variant: Variant,
) -> mx.array:
    """(rows, weight's rows) sums, scaled and with the bias; `columns` is a row of a table."""
    check_product(codes, tiles, weight_scales, columns)
    return multiply_kernel(variant)(
        inputs=[codes.tiles, tiles, codes.scales, weight_scales, columns],
        template=[("T", dtype), ("TILE", variant.columns)],
        output_shapes=[(codes.rows, len(weight_scales))],
        output_dtypes=[dtype],
        **launch(variant, codes.rows, len(weight_scales)),
    )[0]


def multiply_added(
    codes: Codes,
    tiles: mx.array,
    weight_scales: mx.array,
    columns: mx.array,
    residual: mx.array,
    gate: mx.array,
    variant: Variant,
) -> mx.array:
    """The same times (entries, weight's rows) gates plus a (batch, tokens, weight's rows) residual,
    whose shape and dtype it has; rounded once."""
    check_product(codes, tiles, weight_scales, columns)
    shape, width = residual.shape, len(weight_scales)
    if len(shape) != 3 or shape[2] != width or shape[0] * shape[1] != codes.rows:
        valid = f"(batch, tokens, {width}) with batch · tokens = {codes.rows}"
        raise unfit("shape of the residual", shape, valid, "give one of the product's rows")
    if not is_per_entry(gate, residual):
        found = f"{gate.shape} of {gate.dtype}"
        valid = f"(1, {width}) or ({shape[0]}, {width}) of {residual.dtype}"
        raise unfit("gate", found, valid, "give one vector, or one for each entry of the batch")
    return added_kernel(variant)(
        inputs=[
            codes.tiles,
            tiles,
            codes.scales,
            weight_scales,
            mx.contiguous(columns),
            residual,
            gate,
        ],
        template=[("T", residual.dtype), ("TILE", variant.columns)],
        output_shapes=[residual.shape],
        output_dtypes=[residual.dtype],
        **launch(variant, codes.rows, len(weight_scales)),
    )[0]


def multiply_gelu(
    codes: Codes,
    tiles: mx.array,
    weight_scales: mx.array,
    columns: mx.array,
    following: Following,
    variant: Variant,
) -> Codes:
    """The same through GELU, as codes for the next product; NaN of a row stays in its scale."""
    check_product(codes, tiles, weight_scales, columns)
    width = len(weight_scales)
    sizes = following.table.size, following.scale.size, following.limit.size
    if sizes != (2 * padded(width), 1, 1):
        valid = f"({2 * padded(width)}, 1, 1)"
        way_out = f"make it by `following` for {width} columns"
        raise unfit("numbers in table, scale and limit of the next grid", sizes, valid, way_out)
    tiles, scales = gelu_kernel(variant)(
        inputs=[
            codes.tiles,
            tiles,
            codes.scales,
            weight_scales,
            columns,
            following.table,
            following.scale,
            following.limit,
        ],
        template=[("TILE", variant.columns)],
        output_shapes=[(pieces(codes.rows), pieces(width), PIECE, PIECE), (codes.rows,)],
        output_dtypes=[mx.int8, mx.float32],
        **launch(variant, codes.rows, width),
    )
    return Codes(tiles, scales, width)

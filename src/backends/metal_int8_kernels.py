"""Integer kernels for Apple GPUs: how their source is put together, and how they are started.

Rows are padded to whole tiles here; each kernel is compiled when it is first used.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

import mlx.core as mx

from .fusing import InputGrid, check_depth, check_factors, unfit

TILE, SIMDGROUPS = 128, 8  # rows and columns of a tile, and how many simdgroups make one
SIMDGROUP = 32  # threads
ROWS_PER_GROUP = 8  # that a threadgroup of the quantizer takes
INDEX_BELOW = 2**31  # numbers of a matrix that matmul2d can count


def text(name: str) -> str:
    return (resources.files(__package__) / "metal" / f"{name}.metal").read_text(encoding="utf-8")


@lru_cache
def quantize_kernel() -> Any:
    return mx.fast.metal_kernel(
        name="ditq_quantize",
        input_names=["x", "given", "limits", "shifts", "smoothing"],
        output_names=["codes", "scales"],
        source=text("quantize"),
        header=text("quantize_header"),
    )


@lru_cache
def multiply_kernel() -> Any:
    constants = f"constexpr int TILE = {TILE}, SIMDGROUPS = {SIMDGROUPS};\n"
    return mx.fast.metal_kernel(
        name="ditq_multiply",
        input_names=["codes", "weight", "factors", "scales", "bias"],
        output_names=["y"],
        source=constants + text("multiply"),
        header="#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>\n"
        "using namespace metal;\n",
    )


class Codes(NamedTuple):
    """Quantized rows; a row that held NaN has the scale NaN."""

    values: mx.array  # (whole tiles of rows, columns) int8
    scales: mx.array  # (rows,) float32

    def times(self, factors: mx.array) -> Codes:
        """The same codes; each row's scale is so many times as large."""
        check_factors(factors, len(self.scales))
        return Codes(self.values, self.scales * factors)


def whole_tiles(rows: int) -> int:
    return -(-rows // TILE) * TILE


def quantize(x: mx.array, grid: InputGrid) -> Codes:
    """Codes of (…, columns) floats, or of int8 as they are, row by row."""
    columns = x.shape[-1]
    x = x.reshape(-1, columns)
    rows = len(x)
    read = grid.arrays(rows, columns)
    values, scales = quantize_kernel()(
        inputs=[x, *read],
        template=grid.flags(),
        output_shapes=[(whole_tiles(rows), columns), (rows,)],
        output_dtypes=[mx.int8, mx.float32],
        grid=(SIMDGROUP * whole_tiles(rows), 1, 1),
        threadgroup=(SIMDGROUP * ROWS_PER_GROUP, 1, 1),
    )
    return Codes(values, scales)


def multiply(
    codes: Codes, weight: mx.array, scales: mx.array, bias: mx.array | None, dtype: mx.Dtype
) -> mx.array:
    """(rows, weight's rows) sums, scaled and with the bias."""
    width, depth = weight.shape
    check_depth(codes.values.shape[1], depth)
    if scales.size != width:
        raise unfit("number of the weight's scales", scales.size, width, "give one for each output")
    if bias is not None and bias.size != width:
        raise unfit("numbers in the row of biases", bias.size, width, "give one for each output")
    at_once = max(1, (INDEX_BELOW - 1) // depth // TILE) * TILE
    parts = []
    for start in range(0, len(codes.scales), at_once):
        factors = codes.scales[start : start + at_once]
        values = codes.values[start : start + at_once]
        parts += multiply_kernel()(
            inputs=[values, weight, factors, scales, scales if bias is None else bias],
            template=[("T", dtype), ("BIAS", bias is not None)],
            output_shapes=[(len(factors), width)],
            output_dtypes=[dtype],
            grid=(width // TILE * SIMDGROUP * SIMDGROUPS, len(values) // TILE, 1),
            threadgroup=(SIMDGROUP * SIMDGROUPS, 1, 1),
        )
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)

"""Whether the integer kernels are right on this machine: against whole numbers summed by NumPy.

Also how the tiles look from outside (`tiled`, `untiled`), and what the quantizer must give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from . import cuda_int8_kernels as kernels
from .cuda_int8_kernels import PIECE, InputGrid, Variant
from .weight import Weight

CHUNK = 16
SMALLEST_SCALE = np.float32(1e-12)


class Case(NamedTuple):
    """A product: rows, outputs (N), columns (K), bits of the weight."""

    rows: int
    outputs: int
    columns: int
    bits: int


# Ragged and whole tiles, one stage and many, more tiles than blocks, sums beyond 2^24.
SELF_TEST = (
    Case(1, 40, 32, 4),
    Case(77, 200, 1056, 8),
    Case(300, 264, 6144, 4),
    Case(128, 256, 6144, 8),
    Case(2817, 1536, 64, 4),
)
# Each dtype, and each of what a grid may have; Metal's kernels are asked the same.
QUANTIZER_TEST = (
    (77, 96, mx.float16, {"per_token": True}),
    (130, 160, mx.bfloat16, {"shifted": True, "smoothed": True}),
    (33, 1536, mx.float32, {"shifted": True, "smoothed": True, "per_token": True}),
)
ENDING_TEST = (Case(137, 384, 256, 4),)
ENDING_SCALES = (0.03, 0.02)  # of the input, and of what follows GELU


def tiled(codes: np.ndarray) -> np.ndarray:
    """(row pieces, column pieces, 128, 128) int8 as cuda/tiles.cu describes it."""
    rows, columns = (PIECE * kernels.pieces(size) for size in codes.shape)
    whole = np.zeros((rows, columns), np.int8)
    whole[: codes.shape[0], : codes.shape[1]] = codes
    chunks = whole.reshape(rows // PIECE, PIECE, columns // PIECE, PIECE // CHUNK, CHUNK)
    return swapped(chunks.transpose(0, 2, 1, 3, 4))


def untiled(tiles: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(rows, columns) codes of tiles."""
    chunks = tiles.reshape(*tiles.shape[:3], PIECE // CHUNK, CHUNK)
    pieces = swapped(chunks).transpose(0, 2, 1, 3)
    return pieces.reshape(len(tiles) * PIECE, -1)[:rows, :columns]


def swapped(chunks: np.ndarray) -> np.ndarray:
    """Pieces with the chunks of each row in the other order; doing it twice changes nothing."""
    places = np.arange(PIECE // CHUNK)[None] ^ (np.arange(PIECE) % 8)[:, None]
    moved = np.take_along_axis(chunks, places[None, None, :, :, None], axis=3)
    return moved.reshape(*chunks.shape[:2], PIECE, PIECE)


def codes_of(
    x: np.ndarray,
    scale: np.ndarray | float,
    limit: float,
    shift: np.ndarray | None = None,
    smoothing: np.ndarray | None = None,
    per_token: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes of finite rows and the rows' float32 scales, one float32 operation at a time."""
    x = x.astype(np.float32)
    x = x if shift is None else x - shift.astype(np.float32)
    x = x if smoothing is None else x / smoothing.astype(np.float32)
    scales = np.broadcast_to(np.float32(scale), (len(x),))
    if per_token:
        scales = np.maximum(np.abs(x).max(axis=1) / np.float32(limit), SMALLEST_SCALE)
    codes = np.clip(np.rint(x / scales[:, None]), -limit, limit)
    return codes.astype(np.int8), scales


def random_weight(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, Weight]:
    """Codes, every fifth column the most extreme one, and the same packed."""
    half = 2 ** (case.bits - 1)
    codes = rng.integers(-half, half, (case.outputs, case.columns)).astype(np.int8)
    codes[:, ::5] = -half
    raised = (codes.astype(np.int16) + half).astype(np.uint32)
    fields = 32 // case.bits
    words = raised.reshape(case.outputs, -1, fields) << (np.arange(fields) * case.bits)
    packed = words.sum(axis=2, dtype=np.uint64).astype(np.uint32)
    scales = rng.uniform(1e-3, 1e-2, (case.outputs, 1)).astype(np.float32)
    return codes, Weight(mx.array(packed), mx.array(scales), case.bits)


class RandomProduct(NamedTuple):
    """Codes, a factor for each row and a weight, and the float32 outputs to be had of them."""

    x: mx.array  # (rows, columns) float32 codes
    factors: mx.array  # (rows,) float32
    weight: Weight
    wanted: np.ndarray  # (rows, outputs) float32


class RandomInput(NamedTuple):
    """Numbers, mostly ties, the grid that quantizes them, and NumPy's codes and scales."""

    x: mx.array
    grid: InputGrid
    codes: np.ndarray  # (rows, columns) int8
    scales: np.ndarray  # (rows,) float32


class RandomEnding(NamedTuple):
    """An input in floats, a weight and a bias, and the two other endings of their product."""

    x: mx.array  # (rows, columns) float32
    weight: Weight
    bias: mx.array  # (outputs,) float32
    wanted: np.ndarray  # (rows, outputs) float16, with the bias
    codes: np.ndarray  # (rows, outputs) int8, of GELU of the same


def random_product(case: Case, seed: int = 0) -> RandomProduct:
    rng = np.random.default_rng(seed)
    codes, weight = random_weight(rng, case)
    x = rng.integers(-127, 128, (case.rows, case.columns))
    x[:, ::5] = 127
    factors = rng.uniform(0.01, 0.1, case.rows).astype(np.float32)
    sums = x.astype(np.float64) @ codes.T.astype(np.float64)
    scales = np.array(weight.scales)[:, 0]
    wanted = sums.astype(np.float32) * (factors[:, None] * scales)
    return RandomProduct(mx.array(x.astype(np.float32)), mx.array(factors), weight, wanted)


def wrong_sums(variant: Variant, case: Case, seed: int = 0) -> int:
    """How many outputs of a random product differ from NumPy's in any bit."""
    product = random_product(case, seed)
    rows, scales = kernels.quantize(product.x, InputGrid.of_codes(127)), product.weight.scales[:, 0]
    got = kernels.multiply(
        kernels.Codes(rows.tiles, rows.scales * product.factors, case.columns),
        kernels.weight_tiles(product.weight),
        scales,
        kernels.column_table(scales)[0],
        mx.float32,
        variant,
    )
    return int((np.array(got) != product.wanted).sum())


def random_ending(case: Case, seed: int = 0) -> RandomEnding:
    rng = np.random.default_rng(seed)
    codes, weight = random_weight(rng, case)
    x = rng.standard_normal((case.rows, case.columns)).astype(np.float32)
    bias = rng.standard_normal(case.outputs).astype(np.float32)
    scale, following = map(np.float32, ENDING_SCALES)
    sums = codes_of(x, scale, 127)[0].astype(np.float64) @ codes.T.astype(np.float64)
    y = sums * (scale * np.array(weight.scales)[:, 0]) + bias
    gelu = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    behind, _ = codes_of(gelu, following, 127)
    return RandomEnding(mx.array(x), weight, mx.array(bias), y.astype(np.float16), behind)


def wrong_endings(variant: Variant, case: Case, seed: int = 0) -> int:
    """How many outputs in float16, codes behind GELU and their scales are not NumPy's. Either may
    be its neighbour: GELU's tanh is an approximation, and NumPy rounds twice."""
    x, weight, bias, wanted, wanted_codes = random_ending(case, seed)
    grid, following = (InputGrid(mx.array([s]), mx.array([127.0])) for s in ENDING_SCALES)
    scales = weight.scales[:, 0]
    table = kernels.column_table(scales, bias)[0]
    product = kernels.quantize(x, grid), kernels.weight_tiles(weight), scales, table
    got = np.array(kernels.multiply(*product, mx.float16, variant))
    behind = kernels.multiply_gelu(*product, kernels.following(following, case.outputs), variant)
    apart = np.abs(got.astype(np.float32) - wanted.astype(np.float32))
    wrong = int((~(apart <= np.spacing(np.abs(wanted)))).sum())  # NaN is wrong too
    codes = untiled(np.array(behind.tiles), case.rows, case.outputs).astype(int)
    wrong += int((np.abs(codes - wanted_codes) > 1).sum())
    return wrong + int((np.array(behind.scales) != np.float32(ENDING_SCALES[1])).sum())


def random_input(
    rows: int,
    columns: int,
    dtype: mx.Dtype,
    *,
    shifted: bool = False,
    smoothed: bool = False,
    per_token: bool = False,
    seed: int = 0,
) -> RandomInput:
    rng = np.random.default_rng(seed)
    scale, limit = float(rng.choice([0.0625, 0.0431])), float(rng.choice([7, 31, 127]))
    x = np.rint(rng.standard_normal((rows, columns)) * limit) * scale / 2
    held = mx.array(x.astype(np.float32)).astype(dtype)
    shift = rng.standard_normal(columns).astype(np.float32) if shifted else None
    smoothing = rng.uniform(0.3, 3, columns).astype(np.float32) if smoothed else None
    x = np.array(held.astype(mx.float32))
    codes, scales = codes_of(x, scale, limit, shift, smoothing, per_token)
    grid = InputGrid(
        mx.array([scale]),
        mx.array([limit]),
        None if shift is None else mx.array(shift),
        None if smoothing is None else mx.array(smoothing),
        per_token,
    )
    return RandomInput(held, grid, codes, scales)


def wrong_codes(rows: int, columns: int, dtype: mx.Dtype, **how: Any) -> int:
    """How many codes and scales of a `random_input` differ from NumPy's."""
    wanted = random_input(rows, columns, dtype, **how)
    got = kernels.quantize(wanted.x, wanted.grid)
    wrong = np.array(got.tiles) != tiled(wanted.codes)
    return int(wrong.sum()) + int((np.array(got.scales) != wanted.scales).sum())


def first_wrong(cases: Iterable[Any], count: Callable[[Any], int]) -> str:
    """Empty where no case counts a wrong number, else what went wrong with the first that does."""
    for case in cases:
        try:
            wrong = count(case)
        except (RuntimeError, ValueError) as error:  # MLX's, of a kernel that does not compile
            return f"{case}: {str(error).strip().splitlines()[0][:200]}"
        if wrong:
            return f"{case}: {wrong} wrong numbers"
    return ""


@lru_cache
def self_test(variant: Variant) -> str:
    """Empty where all is exact, else what went wrong; run once a process."""
    return (
        first_wrong(SELF_TEST, partial(wrong_sums, variant))
        or first_wrong(QUANTIZER_TEST, lambda case: wrong_codes(*case[:3], **case[3]))
        or first_wrong(ENDING_TEST, partial(wrong_endings, variant))
    )

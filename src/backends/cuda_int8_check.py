"""Whether the integer kernels are right on this machine: against whole numbers summed by NumPy.

Also how the tiles look from outside (`tiled`, `untiled`), and what the quantizer must give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from . import cuda_int8_kernels as kernels
from . import cuda_int8_source as sources
from .cuda_int8_source import CHUNK, PIECE, Variant
from .device import Device, device_name
from .fusing import InputGrid, Modulation
from .remembering import COUNTED, Record, found_once, source_hash
from .weight import Weight

SMALLEST_SCALE = np.float32(1e-12)
DRIVER = Path("/proc/driver/nvidia/version")
COMPILERS = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
# What is compiled, started, asked.
DECIDING = ("cuda_int8_source", "cuda_int8_kernels", "cuda_int8_check", "fusing")


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
    Case(2817, 1600, 160, 8),
)
# Each dtype, and each of what a grid may have; Metal's kernels are asked the same.
QUANTIZER_TEST = (
    (77, 96, mx.float16, {"per_token": True}),
    (130, 160, mx.bfloat16, {"shifted": True, "smoothed": True}),
    (33, 1536, mx.float32, {"shifted": True, "smoothed": True, "per_token": True}),
)
# (batch, tokens, columns), and the same.
NORM_TEST = (
    (2, 77, 200, mx.float16, {}),
    (1, 9, 1536, mx.bfloat16, {"shifted": True, "smoothed": True}),
    (3, 5, 700, mx.float32, {"smoothed": True, "per_token": True}),
)
NORM_EPS = 1e-6
# Sums in another order move a number by a millionth; some lie that close to the next code.
MOST_NEIGHBOURS = 1e-3
ENDING_TEST = (Case(138, 384, 256, 4), Case(33, 100, 64, 4))
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
    """An input in floats, a weight and a bias, and the three other endings of their product."""

    x: mx.array  # (rows, columns) float32
    weight: Weight
    bias: mx.array  # (outputs,) float32
    wanted: np.ndarray  # (rows, outputs) float16, with the bias
    codes: np.ndarray  # (rows, outputs) int8, of GELU of the same
    residual: mx.array  # (1 or 2, tokens, outputs) float16
    gate: mx.array  # (1 or 2, outputs) float16, a part of a larger array
    added: np.ndarray  # (rows, outputs) float16, the residual and the gated output


class RandomNorm(NamedTuple):
    """An input, its modulation and the grid behind it, and NumPy's codes and scales."""

    x: mx.array  # (batch, tokens, columns)
    modulation: Modulation  # parts of a larger array
    grid: InputGrid
    codes: np.ndarray  # (rows, columns) int8
    scales: np.ndarray  # (rows,) float32


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


def fitted(case: Case, variant: Variant) -> Case:
    """With as many outputs more as the kernel wants."""
    return case._replace(outputs=variant.multiple * kernels.pieces(case.outputs, variant.multiple))


def wrong_sums(variant: Variant, case: Case, seed: int = 0) -> int:
    """How many outputs of a random product differ from NumPy's in any bit."""
    case = fitted(case, variant)
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
    batch = 1 + (case.rows % 2 == 0)
    residual = rng.standard_normal((batch, case.rows // batch, case.outputs)).astype(np.float16)
    parts = rng.standard_normal((batch, 3 * case.outputs)).astype(np.float16)
    gate = np.repeat(np.split(parts, 3, axis=1)[2], case.rows // batch, axis=0)
    added = residual.reshape(y.shape).astype(np.float64) + gate * y
    return RandomEnding(
        mx.array(x),
        weight,
        mx.array(bias),
        y.astype(np.float16),
        behind,
        mx.array(residual),
        mx.split(mx.array(parts), 3, axis=1)[2],
        added.astype(np.float16),
    )


def wrong_endings(variant: Variant, case: Case, seed: int = 0) -> int:
    """How many outputs in float16, with and without residual, codes behind GELU and their scales
    are not NumPy's. Each may be its neighbour: GELU's tanh is an approximation, and NumPy rounds
    elsewhere."""
    case = fitted(case, variant)
    ending = random_ending(case, seed)
    grid, following = (InputGrid(mx.array([s]), mx.array([127.0])) for s in ENDING_SCALES)
    scales = ending.weight.scales[:, 0]
    table = kernels.column_table(scales, ending.bias)[0]
    product = (
        kernels.quantize(ending.x, grid),
        kernels.weight_tiles(ending.weight),
        scales,
        table,
    )
    behind = kernels.multiply_gelu(*product, kernels.following(following, case.outputs), variant)
    codes = untiled(np.array(behind.tiles), case.rows, case.outputs).astype(int)
    wrong = int((np.abs(codes - ending.codes) > 1).sum())
    wrong += int((np.array(behind.scales) != np.float32(ENDING_SCALES[1])).sum())
    wrong += not_neighbours(kernels.multiply(*product, mx.float16, variant), ending.wanted)
    added = kernels.multiply_added(*product, ending.residual, ending.gate, variant)
    return wrong + not_neighbours(added.reshape(ending.added.shape), ending.added)


def not_neighbours(got: mx.array, wanted: np.ndarray) -> int:
    """How many float16 numbers differ by more than one step and what float32 loses; NaN does."""
    sizes = np.abs(wanted).astype(np.float32)
    apart = np.abs(np.array(got).astype(np.float32) - wanted.astype(np.float32))
    lost = 1e-6 * max(1.0, sizes.max(initial=0.0))
    return int((~(apart <= np.spacing(np.abs(wanted)) + np.float32(lost))).sum())


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
    shift, smoothing = random_vectors(rng, columns, shifted, smoothed)
    x = np.array(held.astype(mx.float32))
    codes, scales = codes_of(x, scale, limit, shift, smoothing, per_token)
    return RandomInput(held, grid_of(scale, limit, shift, smoothing, per_token), codes, scales)


def random_vectors(
    rng: np.random.Generator, columns: int, shifted: bool, smoothed: bool
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Shift and smoothing, each where it is asked for."""
    return (
        rng.standard_normal(columns).astype(np.float32) if shifted else None,
        rng.uniform(0.3, 3, columns).astype(np.float32) if smoothed else None,
    )


def grid_of(
    scale: float,
    limit: float,
    shift: np.ndarray | None,
    smoothing: np.ndarray | None,
    per_token: bool,
) -> InputGrid:
    given = (None if v is None else mx.array(v) for v in (shift, smoothing))
    return InputGrid(mx.array([scale]), mx.array([limit]), *given, per_token)


def random_modulated(
    batch: int,
    tokens: int,
    columns: int,
    dtype: mx.Dtype,
    *,
    shifted: bool = False,
    smoothed: bool = False,
    per_token: bool = False,
    seed: int = 0,
) -> RandomNorm:
    rng = np.random.default_rng(seed)
    x = mx.array(rng.normal(1, 2, (batch, tokens, columns)).astype(np.float32)).astype(dtype)
    parts = mx.array(rng.normal(0, 0.5, (batch, 3 * columns)).astype(np.float32)).astype(dtype)
    moved, scaled = mx.split(parts, 3, axis=1)[1:]
    shift, smoothing = random_vectors(rng, columns, shifted, smoothed)
    exact, offset, gain = (
        np.array(v.astype(mx.float32)).astype(np.float64) for v in (x, moved, scaled)
    )
    exact = exact - exact.mean(axis=2, keepdims=True)
    exact = exact / np.sqrt(exact.var(axis=2, keepdims=True) + NORM_EPS)
    modulated = (exact * (1 + gain[:, None]) + offset[:, None]).reshape(-1, columns)
    codes, scales = codes_of(modulated, 0.03, 127, shift, smoothing, per_token)
    grid = grid_of(0.03, 127.0, shift, smoothing, per_token)
    return RandomNorm(x, Modulation(scaled, moved, NORM_EPS), grid, codes, scales)


def wrong_modulated(batch: int, tokens: int, columns: int, dtype: mx.Dtype, **how: Any) -> int:
    """How many codes and scales of a `random_modulated` are not NumPy's: by more than one, or any
    where there are many such, or around them where there must be zeros."""
    wanted = random_modulated(batch, tokens, columns, dtype, **how)
    got = kernels.quantize_modulated(wanted.x, wanted.modulation, wanted.grid)
    tiles = np.array(got.tiles)
    codes = untiled(tiles, batch * tokens, columns)
    apart = np.abs(codes.astype(int) - wanted.codes)
    few = (apart > 0).sum() <= max(2, MOST_NEIGHBOURS * apart.size)
    wrong = int((apart > (1 if few else 0)).sum()) + int((tiles != tiled(codes)).sum())
    return wrong + int((~np.isclose(np.array(got.scales), wanted.scales, rtol=1e-5)).sum())


def within(x: mx.array) -> mx.array:
    """The same rows as the tokens of a batch of two, parts of a larger array of NaN."""
    tokens = x.reshape(2, -1, x.shape[1])
    return mx.pad(tokens, ((0, 0), (3, 2), (0, 0)), constant_values=mx.nan)[:, 3:-2]


def wrong_codes(rows: int, columns: int, dtype: mx.Dtype, **how: Any) -> int:
    """How many codes and scales of a `random_input` differ from NumPy's; an even number of rows
    lies within a larger array."""
    wanted = random_input(rows, columns, dtype, **how)
    got = kernels.quantize(wanted.x if rows % 2 else within(wanted.x), wanted.grid)
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
            return f"{case}: {wrong} {COUNTED}"
    return ""


def driver() -> str:
    """Kind and version of the driver in one line, empty where it does not tell."""
    try:
        return DRIVER.read_text(errors="replace").splitlines()[0]
    except (OSError, IndexError):
        return ""


def compiler() -> str:
    """Version of the package that MLX compiles kernels with, empty without one."""
    for name in COMPILERS:
        with suppress(PackageNotFoundError):
            return version(name)
    return ""


def record(variant: Variant) -> Record:
    """Where the self-test's result is kept, and what it holds for."""
    source = source_hash(sources.FOLDER.glob("*.cu"), Path(__file__).parent, DECIDING)
    machine = device_name(), f"sm_{Device.here().generation}", driver(), compiler()
    return Record(f"cuda_int8_{variant.name}", (*machine, mx.__version__, source))


@lru_cache
def self_test(variant: Variant) -> str:
    """Empty where all is exact, else what went wrong; tested once a machine."""
    return found_once(record(variant), partial(try_out, variant))


def try_out(variant: Variant) -> str:
    """The same by testing now."""
    return (
        first_wrong(SELF_TEST, partial(wrong_sums, variant))
        or quantizers_test()
        or first_wrong(ENDING_TEST, partial(wrong_endings, variant))
    )


@lru_cache
def quantizers_test() -> str:
    """The part of the self-test that is the same for all variants."""
    codes = first_wrong(QUANTIZER_TEST, lambda case: wrong_codes(*case[:3], **case[3]))
    return codes or first_wrong(NORM_TEST, lambda case: wrong_modulated(*case[:4], **case[4]))

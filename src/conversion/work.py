"""The conversion itself, rows by rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..quant.grid import SMALLEST_SCALE
from ..quant.int8_operators import LIMIT
from ..store import stream_tensors
from .format import SCALE, WEIGHT, Scheme
from .plan import Plan
from .reading import Source

PIECE_BYTES = 2**20  # of a tensor in memory at a time; its float32 copies stay in the cache

Progress = Callable[[int], object]
"""Is told the bytes that were done since it was told last."""


def convert(source: Source, plan: Plan, output: Path, progress: Progress) -> None:
    """Writes the converted file, which appears when it is whole."""
    converted = {path + WEIGHT for path in plan.converted}
    with stream_tensors(output, plan.outputs, plan.metadata) as writer:
        for name, info in plan.tensors.items():
            if name not in converted:
                for piece in source.pieces(name, PIECE_BYTES):
                    check_finite(piece, info.dtype, name, source.path)
                    writer.write(name, piece)
                    progress(piece.nbytes)
                continue
            scale_name = name.removesuffix(WEIGHT) + SCALE
            for piece in source.pieces(name, piece_bytes(info.nbytes, info.shape[0])):
                weight = rows_of(piece, info.dtype, info.shape[1])
                codes, scale = quantized(weight, plan.scheme)
                if not np.isfinite(scale).all():
                    raise not_finite(name, source.path)
                writer.write(name, codes)
                writer.write(scale_name, scale)
                progress(piece.nbytes)


def piece_bytes(nbytes: int, rows: int) -> int:
    """About PIECE_BYTES, but whole rows of a tensor of this size."""
    row = nbytes // rows
    return row * max(1, PIECE_BYTES // row)


def rows_of(piece: np.ndarray, dtype: str, columns: int) -> np.ndarray:
    """Bytes of a tensor as its rows; floats of every width as float32, codes as they are."""
    if dtype == "bfloat16":  # which numpy has not: the upper half of a float32
        values = (piece.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = piece.view(dtype)
    if dtype == "float16":
        values = values.astype(np.float32)
    return values.reshape(-1, columns)


def quantized(weight: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) int8 codes and (rows, blocks) float32 scales of a float32 weight.

    The numbers are those of `INT8Quantizer`; numpy makes them in a third of the time on a CPU,
    where a conversion should not be slower than the disk.
    """
    rows, columns = weight.shape
    blocks = weight.reshape(rows, scheme.blocks(columns), -1)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    scale = np.maximum(largest / np.float32(LIMIT), np.float32(SMALLEST_SCALE))
    with np.errstate(invalid="ignore"):  # the caller refuses scales that are not finite
        codes = np.rint(blocks / scale).astype(np.int8)
    return codes.reshape(rows, columns), scale[..., 0]


def check_finite(piece: np.ndarray, dtype: str, name: str, path: Path) -> None:
    """Raise if a piece of floats has NaN or infinity."""
    if dtype == "bfloat16":
        exponent = np.uint16(0x7F80)
        finite = not ((piece.view(np.uint16) & exponent) == exponent).any()
    elif dtype in ("float16", "float32", "complex64"):
        finite = bool(np.isfinite(piece.view(dtype)).all())
    else:
        finite = True
    if not finite:
        raise not_finite(name, path)


def not_finite(name: str, path: Path) -> UserError:
    return UserError(
        f"{path}: tensor {name} has NaN or infinity; only finite numbers can be converted: "
        "get the file again"
    )

"""A converted file against its source: both are read again, rows by rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..store import TensorInfo, read_header, read_pieces
from .format import SCALE, WEIGHT
from .plan import Plan
from .reading import Source
from .work import PIECE_BYTES, Progress, piece_bytes, rows_of


@dataclass(frozen=True)
class Cosines:
    """Cosine of each converted layer's weight to what its codes and scales stand for."""

    of: dict[str, float]

    @property
    def line(self) -> str:
        worst = min(self.of, key=lambda path: self.of[path])
        mean = sum(self.of.values()) / len(self.of)
        return f"worst cosine {self.of[worst]:.6f} ({worst}), mean {mean:.6f}"


def verify(source: Source, plan: Plan, output: Path, progress: Progress) -> Cosines:
    """Raises where a tensor that was kept is not the same, byte for byte."""
    written, _ = read_header(output)
    if written != plan.outputs:
        raise UserError(f"{output} does not hold the tensors that were to be written; delete it")
    cosines = {}
    converted = {path + WEIGHT: path for path in plan.converted}
    for name, info in plan.tensors.items():
        if name in converted:
            cosines[converted[name]] = _cosine(source, name, (output, written), progress)
            continue
        pairs = zip(
            source.pieces(name, PIECE_BYTES),
            read_pieces(output, written[name], PIECE_BYTES),
            strict=True,
        )
        if not all(np.array_equal(ours, theirs) for ours, theirs in pairs):
            raise UserError(f"{output}: tensor {name} is not that of {source.path}; delete it")
        progress(info.nbytes)
    return Cosines(cosines)


def _cosine(
    source: Source, name: str, written: tuple[Path, dict[str, TensorInfo]], progress: Progress
) -> float:
    """1 for a weight that is zero, whose codes are zero too."""
    output, tensors = written
    info, codes = source.tensors[name], tensors[name]
    scale = tensors[name.removesuffix(WEIGHT) + SCALE]
    rows, columns = info.shape
    step = piece_bytes(info.nbytes, rows)
    rows_a_piece = step // (info.nbytes // rows)
    sums = np.zeros(3)
    for ours, code_bytes, scale_bytes in zip(
        source.pieces(name, step),
        read_pieces(output, codes, rows_a_piece * columns),
        read_pieces(output, scale, rows_a_piece * scale.nbytes // rows),
        strict=True,
    ):
        weight = rows_of(ours, info.dtype, columns)
        blocks = rows_of(code_bytes, "int8", columns).reshape(len(weight), scale.shape[1], -1)
        scales = rows_of(scale_bytes, "float32", scale.shape[1])
        stored = (blocks * scales[..., None]).reshape(weight.shape)
        pairs = ((weight, stored), (weight, weight), (stored, stored))
        # Sums of a row in float32, of the rows in float64: a layer has tens of millions of terms.
        sums += [np.einsum("rk,rk->r", a, b).sum(dtype=np.float64) for a, b in pairs]
        progress(ours.nbytes)
    across, before, after = sums
    return float(across / np.sqrt(before * after)) if before and after else float(before == after)

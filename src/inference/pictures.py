"""Pictures on disk: each model's own, and both side by side with their difference."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..report.sheet import contact_sheet
from .compare import REFERENCE, Compared

AMPLIFIED = 4  # times the difference, which is small where quantization is good
SMALL = 256  # pixels: smaller pictures are shown twice as large side by side


def compare_paths(path: Path) -> tuple[Path, Path]:
    """Beside picture.png: picture_16bit.png and picture_compare.png."""
    return path.with_stem(f"{path.stem}_16bit"), path.with_stem(f"{path.stem}_compare")


def write_side_by_side(path: Path, compared: Compared, name: str) -> Path:
    """The 16-bit picture, the quantized one of that name, and their amplified difference."""
    pictures = [compared.reference, compared.quantized, difference(compared)]
    scale = 2 if compared.reference.shape[0] < SMALL else 1
    captions = [REFERENCE, name, f"difference, {AMPLIFIED} times"]
    contact_sheet(np.stack(pictures), path, captions, columns=3, scale=scale)
    return path


def difference(compared: Compared) -> np.ndarray:
    """Absolute, amplified, black where the pictures are equal."""
    apart = np.abs(compared.reference.astype(int) - compared.quantized.astype(int))
    return np.clip(AMPLIFIED * apart, 0, 255).astype(np.uint8)

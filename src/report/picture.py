"""One picture on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..store import atomic_write


def write_picture(path: Path, picture: np.ndarray, *, prompt: str, seed: int, model: str) -> Path:
    """A PNG that says what it shows; `model` is the pipeline's own name."""
    info = PngInfo()
    for key, value in (("prompt", prompt), ("seed", str(seed)), ("model", model)):
        info.add_itxt(key, value)
    with atomic_write(path) as file:
        Image.fromarray(picture).save(file, "PNG", pnginfo=info)
    return path

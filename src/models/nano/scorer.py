"""The scorer: a small convolutional network that reads a picture's objects and gives features.

On a 16x16 grid, every cell says whether an object's centre lies there, what the object is and where
in the cell; one more head reads the background from the whole picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ...errors import UserError
from .scenes import (
    BACKGROUNDS,
    COLOURS,
    DATA_VERSION,
    MAX_OBJECTS,
    PICTURE_SIZE,
    SHAPES,
    SIZES,
    TEXTURES,
)

GRID_SIZE = 16
CELL = PICTURE_SIZE / GRID_SIZE
ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "texture": TEXTURES}
MAX_DETECTIONS = MAX_OBJECTS + 1
HEAT_THRESHOLD = 0.4
HEAT_PRIOR = -3.0  # most cells hold no centre: training starts from there
SPATIAL_CHANNELS = 12


@dataclass(frozen=True)
class Detections:
    """Objects found in pictures, best first; one more slot than a caption can name."""

    present: np.ndarray  # (n, 4) bool
    score: np.ndarray  # (n, 4) heat at the peak, 0 to 1
    shape: np.ndarray  # (n, 4) codes
    colour: np.ndarray  # (n, 4)
    size: np.ndarray  # (n, 4)
    texture: np.ndarray  # (n, 4)
    x: np.ndarray  # (n, 4) centre in pixels
    y: np.ndarray  # (n, 4) centre in pixels
    background: np.ndarray  # (n,) code


def fold(x: mx.array) -> mx.array:
    """(n, h, w, c) to (n, h/2, w/2, 4c): each 2x2 square becomes channels.

    With a linear layer behind it this halves a map like a strided convolution, whose gradient MLX
    computes slowly on the CPU.
    """
    n, height, width, channels = x.shape
    squares = x.reshape(n, height // 2, 2, width // 2, 2, channels)
    return squares.swapaxes(2, 3).reshape(n, height // 2, width // 2, 4 * channels)


class ResidualBlock(nn.Module):
    """x + convolutions of the normalised x; with ``inner`` < channels it is a bottleneck."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.enter = nn.Conv2d(channels, inner, 3, padding=1)
        self.leave_norm = nn.LayerNorm(inner)
        self.leave = nn.Conv2d(inner, channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        hidden = self.enter(nn.silu(self.norm(x)))
        return x + self.leave(nn.silu(self.leave_norm(hidden)))


class Scorer(nn.Module):
    """Pictures (n, 128, 128, 3) in [0, 1] to per-cell logits and features."""

    def __init__(self, channels: tuple[int, int, int] = (32, 64, 128), blocks: int = 4):
        super().__init__()
        narrow, middle, wide = channels
        self.stem = nn.Conv2d(12, narrow, 3, padding=1)
        self.stem_block = ResidualBlock(narrow, narrow // 2)
        self.to_middle = nn.Linear(4 * narrow, middle)
        self.middle_block = ResidualBlock(middle, middle)
        self.to_wide = nn.Linear(4 * middle, wide)
        self.wide_blocks = [ResidualBlock(wide, wide // 4) for _ in range(blocks)]
        self.norm = nn.LayerNorm(wide)
        cell_outputs = 1 + 2 + sum(len(names) for names in ATTRIBUTES.values())
        self.cell_head = nn.Linear(wide, cell_outputs)
        self.background_head = nn.Linear(wide, len(BACKGROUNDS))

    def maps(self, pictures: mx.array) -> tuple[mx.array, mx.array]:
        """The middle (n, 32, 32, 64) and last (n, 16, 16, 128) feature maps."""
        x = self.stem_block(self.stem(fold(2 * pictures - 1)))
        middle = self.middle_block(self.to_middle(fold(nn.silu(x))))
        x = self.to_wide(fold(nn.silu(middle)))
        for block in self.wide_blocks:
            x = block(x)
        return nn.silu(middle), nn.silu(self.norm(x))

    def __call__(self, pictures: mx.array) -> dict[str, mx.array]:
        """Logits: "heat" (n, 16, 16), "offset" (n, 16, 16, 2) in cells, one map per attribute, and
        "background" (n, 6).
        """
        return self.heads(self.maps(pictures)[1])

    def heads(self, last: mx.array) -> dict[str, mx.array]:
        """The logits that follow from the last map."""
        cells = self.cell_head(last)
        logits = {"heat": cells[..., 0] + HEAT_PRIOR, "offset": cells[..., 1:3]}
        start = 3
        for name, names in ATTRIBUTES.items():
            logits[name] = cells[..., start : start + len(names)]
            start += len(names)
        logits["background"] = self.background_head(last.mean(axis=(1, 2)))
        return logits

    def features(self, pictures: mx.array) -> mx.array:
        """(n, 192) means of the last and the middle map, for the Fréchet distance."""
        return pooled_maps(*self.maps(pictures))

    def spatial_features(self, pictures: mx.array) -> mx.array:
        """(n, 192) 12 channels of the middle map on a 4x4 grid, for the spatial distance."""
        return gridded_map(self.maps(pictures)[0])

    def detect(self, pictures: mx.array, batch_size: int = 64) -> Detections:
        """The objects and the background that the network sees in each picture."""
        parts = []
        for start in range(0, len(pictures), batch_size):
            logits = self(pictures[start : start + batch_size])
            parts.append({name: np.array(values) for name, values in logits.items()})
        return decode({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def pooled_maps(middle: mx.array, last: mx.array) -> mx.array:
    """Means of both maps over the picture, the last one's first."""
    return mx.concatenate([last.mean(axis=(1, 2)), middle.mean(axis=(1, 2))], axis=-1)


def gridded_map(middle: mx.array) -> mx.array:
    """Means of the first channels over each cell of a 4x4 grid."""
    n, height, width, channels = middle.shape
    grid = middle.reshape(n, 4, height // 4, 4, width // 4, channels).mean(axis=(2, 4))
    return grid[..., :SPATIAL_CHANNELS].reshape(n, -1)


def decode(logits: dict[str, np.ndarray]) -> Detections:
    """Detections from the network's logits: local peaks of the heat, and the attributes there."""
    heat = 1 / (1 + np.exp(-logits["heat"].astype(np.float64)))
    padded = np.pad(heat, ((0, 0), (1, 1), (1, 1)))
    shifts = [padded[:, i : i + GRID_SIZE, j : j + GRID_SIZE] for i in range(3) for j in range(3)]
    peaks = np.where(heat >= np.max(shifts, axis=0), heat, 0).reshape(len(heat), -1)
    cell = np.argsort(-peaks, axis=1, kind="stable")[:, :MAX_DETECTIONS]
    score = np.take_along_axis(peaks, cell, axis=1)
    row = np.arange(len(heat))[:, None]
    codes = {
        name: logits[name].reshape(len(heat), GRID_SIZE**2, -1)[row, cell].argmax(axis=-1)
        for name in ATTRIBUTES
    }
    offset = logits["offset"].reshape(len(heat), GRID_SIZE**2, 2)[row, cell]
    return Detections(
        present=score > HEAT_THRESHOLD,
        score=score,
        x=(cell % GRID_SIZE + 0.5 + offset[..., 0]) * CELL,
        y=(cell // GRID_SIZE + 0.5 + offset[..., 1]) * CELL,
        background=logits["background"].argmax(axis=-1),
        **codes,
    )


def parameter_count(model: nn.Module) -> int:
    """How many numbers the model holds."""
    return sum(array.size for _, array in tree_flatten(model.parameters()))


def save_scorer(scorer: Scorer, path: Path | str) -> None:
    """Write the weights as float16 safetensors, with the data version in the metadata."""
    weights = tree_map(lambda array: array.astype(mx.float16), scorer.parameters())
    metadata = {"format": "mlx", "data_version": str(DATA_VERSION)}
    mx.save_safetensors(str(path), dict(tree_flatten(weights)), metadata=metadata)


def load_scorer(path: Path | str) -> Scorer:
    """The scorer saved at ``path``, in float32, ready to read pictures."""
    if not Path(path).is_file():
        raise UserError(f"no scorer at {path}: train one with `python -m tools.train_scorer`")
    try:
        weights, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
    except RuntimeError as error:
        raise UserError(f"{path} is no readable safetensors file: train it again") from error
    if metadata.get("data_version") != str(DATA_VERSION):
        raise UserError(
            f"{path} was trained on scenes of version {metadata.get('data_version')}, this code "
            f"renders version {DATA_VERSION}: train it again with `python -m tools.train_scorer`"
        )
    scorer = Scorer()
    float32 = [(name, array.astype(mx.float32)) for name, array in weights.items()]
    try:
        scorer.load_weights(float32)
    except ValueError as error:
        raise UserError(f"{path} does not hold this scorer's weights: train it again") from error
    scorer.eval()
    return scorer

"""The networks whose features stand for pictures: nano's scorer, or an Inception-v3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..models.inception import POOLED, SPATIAL_CHANNELS, SPATIAL_SIDE, InceptionV3, load_inception
from ..models.load import NANO
from ..models.nano.scenes import COLOURS, PICTURE_SIZE, SHAPES
from ..models.nano.scorer import Scorer, gridded_map, load_scorer, pooled_maps
from ..store import hash_file


@dataclass(frozen=True)
class Features:
    """Of some pictures, a row each."""

    pooled: np.ndarray  # for the Fréchet distance
    spatial: np.ndarray  # of a map before, with places: for sFID
    probabilities: np.ndarray  # of classes, for the Inception Score


@dataclass(frozen=True)
class Identity:
    """Which network it is: only features of the same one can be compared."""

    name: str
    hash: str  # of the file of its weights
    pooled: int  # features
    spatial: int
    classes: int

    def described(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.hash} | {
            name: getattr(self, name) for name in ("pooled", "spatial", "classes")
        }


class Network(Protocol):
    identity: Identity

    def check(self, height: int, width: int) -> None:
        """Raises for pictures of a size, in pixels, that it cannot read."""

    def __call__(self, pictures: np.ndarray) -> Features:
        """Of 8-bit pictures (n, height, width, 3)."""


class ScorerNetwork:
    """nano's scorer. Its classes are the shape and the colour of the most visible object."""

    def __init__(self, path: Path = NANO / "scorer.safetensors") -> None:
        self.scorer: Scorer = load_scorer(path)
        classes = len(SHAPES) * len(COLOURS)
        self.identity = Identity("nano's scorer", hash_file(path), 192, 192, classes)

    def check(self, height: int, width: int) -> None:
        if (height, width) != (PICTURE_SIZE, PICTURE_SIZE):
            raise UserError(
                f"nano's scorer reads pictures of {PICTURE_SIZE}x{PICTURE_SIZE}, these have "
                f"{height}x{width}; give an Inception-v3 by --inception FILE"
            )

    def __call__(self, pictures: np.ndarray) -> Features:
        middle, last = self.scorer.maps(mx.array(pictures) / 255)
        probabilities = shape_and_colour(self.scorer.heads(last))
        return as_numpy(pooled_maps(middle, last), gridded_map(middle), probabilities)


def shape_and_colour(logits: Mapping[str, mx.array]) -> mx.array:
    """(n, 90): products of both attributes' probabilities in the cell with the greatest heat."""
    heat = logits["heat"]
    cell = mx.argmax(heat.reshape(len(heat), -1), axis=1)[:, None, None]

    def there(name: str) -> mx.array:
        cells = logits[name].reshape(len(heat), -1, logits[name].shape[-1])
        return mx.softmax(mx.take_along_axis(cells, cell, axis=1)[:, 0], axis=-1)

    shape, colour = there("shape"), there("colour")
    return (shape[:, :, None] * colour[:, None, :]).reshape(len(heat), -1)


class InceptionNetwork:
    """Inception-v3 on the user's weights; its classes are those that it was trained on."""

    def __init__(self, path: str | Path) -> None:
        self.model: InceptionV3 = load_inception(path)
        spatial = SPATIAL_CHANNELS * SPATIAL_SIDE**2
        classes = len(self.model.fc.weight)
        self.identity = Identity("Inception-v3", hash_file(path), POOLED, spatial, classes)

    def check(self, height: int, width: int) -> None:
        """Every size is resized to its own."""

    def __call__(self, pictures: np.ndarray) -> Features:
        found = self.model(mx.array(pictures))
        return as_numpy(found.pooled, found.spatial, mx.softmax(found.logits, axis=-1))


def as_numpy(*arrays: mx.array) -> Features:
    mx.eval(arrays)
    return Features(*(np.array(array) for array in arrays))


def network(inception: str | Path | None) -> ScorerNetwork | InceptionNetwork:
    """Inception-v3 on the weights in that file, or without one the scorer."""
    return ScorerNetwork() if inception is None else InceptionNetwork(inception)

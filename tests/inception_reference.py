"""Inception-v3 in NumPy, batch norms and all, by torchvision's names; and random weights for it."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

Array = np.ndarray
Weights = dict[str, Array]

# Block: inputs, then per branch its convolutions as name, channels, kernel, stride.
ROW, COLUMN = (1, 7), (7, 1)


def block_a(pooled: int) -> dict:
    return {
        "one": [("branch1x1", 64, (1, 1), 1)],
        "five": [("branch5x5_1", 48, (1, 1), 1), ("branch5x5_2", 64, (5, 5), 1)],
        "double": [
            ("branch3x3dbl_1", 64, (1, 1), 1),
            ("branch3x3dbl_2", 96, (3, 3), 1),
            ("branch3x3dbl_3", 96, (3, 3), 1),
        ],
        "average": [("branch_pool", pooled, (1, 1), 1)],
    }


def block_b() -> dict:
    return {
        "three": [("branch3x3", 384, (3, 3), 2)],
        "double": [
            ("branch3x3dbl_1", 64, (1, 1), 1),
            ("branch3x3dbl_2", 96, (3, 3), 1),
            ("branch3x3dbl_3", 96, (3, 3), 2),
        ],
        "halve": [],
    }


def block_c(inner: int) -> dict:
    kernels = [(1, 1), COLUMN, ROW, COLUMN, ROW]
    return {
        "one": [("branch1x1", 192, (1, 1), 1)],
        "seven": [
            ("branch7x7_1", inner, (1, 1), 1),
            ("branch7x7_2", inner, ROW, 1),
            ("branch7x7_3", 192, COLUMN, 1),
        ],
        "double": [
            (f"branch7x7dbl_{i + 1}", 192 if i == 4 else inner, kernel, 1)
            for i, kernel in enumerate(kernels)
        ],
        "average": [("branch_pool", 192, (1, 1), 1)],
    }


def block_d() -> dict:
    return {
        "three": [("branch3x3_1", 192, (1, 1), 1), ("branch3x3_2", 320, (3, 3), 2)],
        "seven": [
            ("branch7x7x3_1", 192, (1, 1), 1),
            ("branch7x7x3_2", 192, ROW, 1),
            ("branch7x7x3_3", 192, COLUMN, 1),
            ("branch7x7x3_4", 192, (3, 3), 2),
        ],
        "halve": [],
    }


def block_e() -> dict:
    three = ("branch3x3_1", 384, (1, 1), 1)
    double = [("branch3x3dbl_1", 448, (1, 1), 1), ("branch3x3dbl_2", 384, (3, 3), 1)]
    return {
        "one": [("branch1x1", 320, (1, 1), 1)],
        "three_a": [three, ("branch3x3_2a", 384, (1, 3), 1)],
        "three_b": [three, ("branch3x3_2b", 384, (3, 1), 1)],
        "double_a": [*double, ("branch3x3dbl_3a", 384, (1, 3), 1)],
        "double_b": [*double, ("branch3x3dbl_3b", 384, (3, 1), 1)],
        "average": [("branch_pool", 192, (1, 1), 1)],
    }


STEM = [
    ("Conv2d_1a_3x3", 3, 32, (3, 3)),
    ("Conv2d_2a_3x3", 32, 32, (3, 3)),
    ("Conv2d_2b_3x3", 32, 64, (3, 3)),
    ("Conv2d_3b_1x1", 64, 80, (1, 1)),
    ("Conv2d_4a_3x3", 80, 192, (3, 3)),
]
MIXED = {
    "5b": (192, block_a(32)),
    "5c": (256, block_a(64)),
    "5d": (288, block_a(64)),
    "6a": (288, block_b()),
    "6b": (768, block_c(128)),
    "6c": (768, block_c(160)),
    "6d": (768, block_c(160)),
    "6e": (768, block_c(192)),
    "7a": (768, block_d()),
    "7b": (1280, block_e()),
    "7c": (2048, block_e()),
}


def shapes(classes: int) -> dict[str, tuple[int, ...]]:
    """Of every convolution, by path, as PyTorch has them; and of the last layer."""
    found = {name: (rows, columns, *kernel) for name, columns, rows, kernel in STEM}
    for block, (inputs, branches) in MIXED.items():
        for branch in branches.values():
            columns = inputs
            for name, rows, kernel, _ in branch:
                found[f"Mixed_{block}.{name}"] = (rows, columns, *kernel)
                columns = rows
    return found | {"fc": (classes, 2048)}


def random_weights(classes: int, seed: int = 0) -> Weights:
    """Of a size that keeps signals alive, with batch norms that are not trivial."""
    rng, weights = np.random.default_rng(seed), {}
    for path, shape in shapes(classes).items():
        fan_in = int(np.prod(shape[1:]))
        kernel = rng.normal(0, np.sqrt(2 / fan_in), shape).astype(np.float32)
        if path == "fc":
            weights |= {"fc.weight": kernel, "fc.bias": rng.normal(0, 1, classes)}
            continue
        weights[f"{path}.conv.weight"] = kernel
        for name, low, high in (
            ("weight", 0.8, 1.2),
            ("bias", -0.1, 0.1),
            ("running_mean", -0.1, 0.1),
            ("running_var", 0.8, 1.2),
        ):
            weights[f"{path}.bn.{name}"] = rng.uniform(low, high, shape[0])
    return {name: array.astype(np.float32) for name, array in weights.items()}


def convolve(x: Array, weights: Weights, path: str, stride: int = 1, padded: bool = True) -> Array:
    """Convolution, batch norm, ReLU of (n, height, width, channels)."""
    kernel = weights[f"{path}.conv.weight"]
    rows, _, height, width = kernel.shape
    if padded and stride == 1:
        x = np.pad(x, ((0, 0), (height // 2,) * 2, (width // 2,) * 2, (0, 0)))
    windows = sliding_window_view(x, (height, width), axis=(1, 2))[:, ::stride, ::stride]
    y = np.tensordot(windows, kernel, axes=((3, 4, 5), (1, 2, 3)))
    gain, bias, mean, variance = (
        weights[f"{path}.bn.{name}"] for name in ("weight", "bias", "running_mean", "running_var")
    )
    return np.maximum((y - mean) / np.sqrt(variance + 0.001) * gain + bias, 0)


def pool(x: Array, how: str) -> Array:
    """Of 3x3 windows: halving, or in place the largest or a mean, of all or of what is inside."""
    if how == "halve":
        return sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max(axis=(-2, -1))
    edges = ((0, 0), (1, 1), (1, 1), (0, 0))
    fill = {"largest": -np.inf, "whole": 0.0, "inside": np.nan}[how]
    windows = sliding_window_view(np.pad(x, edges, constant_values=fill), (3, 3), axis=(1, 2))
    return windows.max(axis=(-2, -1)) if how == "largest" else np.nanmean(windows, axis=(-2, -1))


def run(x: Array, weights: Weights) -> tuple[Array, Array, Array]:
    """Pooled features, the map after Mixed_6d and logits without the bias; pictures -1 to 1."""
    tensorflow = len(weights["fc.weight"]) == 1008
    for index, (path, *_) in enumerate(STEM):
        x = convolve(x, weights, path, 2 if index == 0 else 1, index not in (0, 1, 4))
        x = pool(x, "halve") if index in (2, 4) else x
    maps = {}
    for block, (_, branches) in MIXED.items():
        average = "inside" if tensorflow else "whole"
        if tensorflow and block == "7c":
            average = "largest"
        parts = []
        for kind, branch in branches.items():
            y = pool(x, average if kind == "average" else kind) if kind in POOLS else x
            for name, _, _, stride in branch:
                y = convolve(y, weights, f"Mixed_{block}.{name}", stride)
            parts.append(y)
        x = np.concatenate(parts, axis=-1)
        maps[block] = x
    pooled = x.mean(axis=(1, 2))
    return pooled, maps["6d"], pooled @ weights["fc.weight"].T


POOLS = ("average", "halve")

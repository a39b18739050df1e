"""How a layer's range and tier change over the steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .artifacts import LayerConfig
from .smooth import Search

KINDS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv"}


def kind_of(path: str) -> str:
    """Stream and role of the input with that path, such as "image fc2"."""
    stream = "text" if ".text_transformer_block." in path else "image"
    name = path.rpartition(".")[2]
    second = " (second)" if ".attn2." in path else ""
    return f"{stream} {KINDS.get(name, name)}{second}"


def block_of(path: str) -> int:
    return int(path.split(".")[1])


def describe(
    largest: np.ndarray, layer: LayerConfig, readers: Sequence[str], search: Search | None
) -> dict[str, Any]:
    """One input over the steps: its range, its tiers, its scales, its smoothing.

    `variability` is the standard deviation of the range's natural logarithm.
    """
    width = np.maximum(largest, 1e-30)
    described: dict[str, Any] = {
        "linears": list(readers),
        "largest": [float(value) for value in largest],
        "variability": float(np.log(width).std()),
        "widest_over_narrowest": float(width.max() / width.min()),
        "bits": list(layer.bits),
        "scales": len(scales_needed(layer)),
        "switches": len(set(layer.bits)) > 1,
    }
    if search is not None:
        described["smoothing"] = {
            "strength": search.strength,
            "output_error": search.error,
            "output_error_without": search.error_without,
        }
    return described


def scales_needed(layer: LayerConfig) -> set[tuple[int, float]]:
    return set(zip(layer.bits, layer.scale, strict=True))


def tiers_by_kind(layers: Mapping[str, LayerConfig]) -> dict[str, Counter[int]]:
    """How many (layer, step) pairs of each kind of input have each tier."""
    table: dict[str, Counter[int]] = {}
    for path, layer in layers.items():
        table.setdefault(kind_of(path), Counter()).update(layer.bits)
    return dict(sorted(table.items()))

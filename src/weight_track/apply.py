"""Rounded weights put into a 16-bit model, to measure what rounding alone does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from ..models.mmdit import MMDiT
from ..models.paths import BLOCKS, block_linears
from ..quant.artifacts import FINAL, RoundedLayer, block_file, load_rounded_block
from ..quant.grid import dequantize


@contextmanager
def rounded_weights(transformer: MMDiT, folder: Path, part: str = FINAL) -> Iterator[None]:
    """The linears compute with the folder's dequantized weights while the context lasts."""
    linears, kept = block_linears(transformer), {}
    try:
        for index in range(len(transformer[BLOCKS])):
            if not (folder / block_file(index, part)).exists():
                continue
            for path, layer in load_rounded_block(folder, index, part).items():
                linear = linears[path]
                kept[path] = (linear.weight, linear.get("bias"))
                linear.weight = weight_of(layer).astype(linear.weight.dtype)
                if layer.bias is not None:
                    linear.bias = mx.array(layer.bias).astype(linear.weight.dtype)
        yield
    finally:
        for path, (weight, bias) in kept.items():
            linears[path].weight = weight
            linears[path].pop("bias", None)
            if bias is not None:
                linears[path].bias = bias


def weight_of(layer: RoundedLayer) -> mx.array:
    """The float32 weight that the codes stand for, smoothing undone."""
    weight = dequantize(mx.array(layer.codes), mx.array(layer.scale))
    return weight if layer.smoothing is None else weight / mx.array(layer.smoothing)

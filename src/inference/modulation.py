"""Modulation linears with 8-bit weights, by MLX's own layer; their inputs stay in floats."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..backends.weight import group_size as mlx_group_size
from ..models.mmdit import MMDiT

BITS = 8


def quantize_modulation(transformer: MMDiT, bits: int = BITS, group_size: int = 128) -> list[str]:
    """Replaces the modulation linears that are not quantized yet; returns their paths.

    Scales and biases are kept in 16 bits. Where the group size does not divide a layer's input,
    or is all of it, the next smaller of MLX's is taken.
    """
    replacements = []
    for path, layer in transformer.modulation_layers().items():
        linear = layer.layers[1]
        if isinstance(linear, nn.Linear):
            size = mlx_group_size(linear.weight.shape[1], group_size)
            replacements.append((f"{path}.layers.1", rounded(linear, bits, size)))
    transformer.update_modules(tree_unflatten(replacements))
    return [path for path, _ in replacements]


def rounded(linear: nn.Linear, bits: int, group_size: int) -> nn.QuantizedLinear:
    """The layer with its weight on MLX's affine grid."""
    weight, bias = linear.weight, linear.get("bias")
    rows, columns = weight.shape
    if weight.dtype == mx.float32:
        weight = weight.astype(mx.float16)
    layer = nn.QuantizedLinear(columns, rows, bias is not None, group_size, bits)
    layer.weight, layer.scales, layer.biases = mx.quantize(weight, group_size, bits)
    if bias is not None:
        layer.bias = bias
    mx.eval(layer.parameters())
    return layer

"""Random transformers of full size, made on the device in moments; what they draw is noise."""

from __future__ import annotations

import math

from src.models.mmdit import MMDiT

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten


def fill_random(model: MMDiT, dtype: mx.Dtype, seed: int = 0) -> None:
    """Weights that keep the size of what passes through them, one block's in float32 at a time."""
    for index, part in enumerate([*model.multimodal_transformer_blocks, *outside_of_blocks(model)]):
        fill_part(part, dtype, seed + index)


def fill_part(part: nn.Module, dtype: mx.Dtype, seed: int) -> None:
    """The same for one module of a transformer."""
    key, values = mx.random.key(seed), []
    for name, tensor in sorted(tree_flatten(part.parameters())):
        key, own = mx.random.split(key)
        values.append((name, drawn(name, tensor, own).astype(dtype)))
    part.update(tree_unflatten(values))
    mx.eval(part.parameters())
    mx.clear_cache()


def outside_of_blocks(model: MMDiT) -> list[nn.Module]:
    return [
        model[name]
        for name in (
            *("x_embedder", "x_pos_embedder", "y_embedder", "t_embedder"),
            *("context_embedder", "final_layer"),
        )
    ]


def drawn(name: str, tensor: mx.array, key: mx.array) -> mx.array:
    if tensor.ndim > 1:
        return mx.random.normal(tensor.shape, key=key) / math.sqrt(math.prod(tensor.shape[1:]))
    if name.endswith("bias"):
        return 0.1 * mx.random.normal(tensor.shape, key=key)
    return mx.random.uniform(0.5, 1.5, tensor.shape, key=key)  # the scale of a norm

"""Seeded random weights, for models that exist to be tested or timed."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Fills every parameter so that every path matters: biases and norms too, float32.

    Matrices keep the scale of what passes through them. NumPy draws them, in the order of the
    names, so that they are the same on every machine.
    """
    rng = np.random.default_rng(seed)
    weights = []
    for name, tensor in sorted(tree_flatten(module.parameters())):
        if tensor.ndim > 1:
            value = rng.standard_normal(tensor.shape) / math.sqrt(math.prod(tensor.shape[1:]))
        elif name.endswith("bias"):
            value = 0.5 * rng.standard_normal(tensor.shape)
        else:  # the scale of a norm
            value = rng.uniform(0.5, 1.5, tensor.shape)
        weights.append((name, mx.array(value.astype(np.float32))))
    module.update(tree_unflatten(weights))

"""Seeded random weights, for models that exist to be tested or timed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .mmdit import MMDiT
from .paths import module_at


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


def plant_outliers(model: MMDiT, path: str, channels: Sequence[int], factor: float) -> None:
    """Makes some input channels of a linear `factor` times as wide and its weights there as much
    narrower: the model computes what it did (nearly so behind GELU), but is harder to quantize.

    The path is that of a q_proj, whose input k and v share, of an fc1 or an fc2.
    """
    parent_path, _, name = path.rpartition(".")
    parent = module_at(model, parent_path)
    block = module_at(model, parent_path.rpartition(".")[0])
    factors = channel_factors(module_at(model, path).weight.shape[1], channels, factor)
    if name == "fc2":
        parent.fc1.weight = parent.fc1.weight * factors[:, None]
        parent.fc1.bias = parent.fc1.bias * factors
    elif name in ("q_proj", "fc1"):
        first = 3 if name == "fc1" else 6 if parent_path.endswith("attn2") else 0
        widen_modulated(block.adaLN_modulation.layers[1], first, factors)
    else:
        raise ValueError(f"outliers can be planted before q_proj, fc1 and fc2, not {path}")
    for reader in ("q_proj", "k_proj", "v_proj") if name == "q_proj" else (name,):
        parent[reader].weight = parent[reader].weight / factors


def channel_factors(size: int, channels: Sequence[int], factor: float) -> mx.array:
    factors = np.ones(size, dtype=np.float32)
    factors[list(channels)] = factor
    return mx.array(factors)


def widen_modulated(modulation: nn.Linear, shift_part: int, factors: mx.array) -> None:
    """Multiplies what a modulation makes of a layer norm: x·(1 + scale) + shift."""
    hidden = len(factors)
    weight, bias = np.array(modulation.weight), np.array(modulation.bias)
    wide = np.array(factors)
    shift = slice(shift_part * hidden, (shift_part + 1) * hidden)
    scale = slice((shift_part + 1) * hidden, (shift_part + 2) * hidden)
    for rows in (shift, scale):
        weight[rows] *= wide[:, None]
        bias[rows] *= wide
    bias[scale] += wide - 1  # factor·(1 + scale) = 1 + new scale
    modulation.weight, modulation.bias = mx.array(weight), mx.array(bias)


def plant_offset(model: MMDiT, path: str, channels: Sequence[int], centre: float) -> None:
    """Moves some input channels of an fc2 to a centre far above 0, where GELU is the identity; its
    bias takes back what that adds."""
    mlp = module_at(model, path.rpartition(".")[0])
    offset = channel_factors(mlp.fc2.weight.shape[1], channels, 1 + centre) - 1
    mlp.fc1.bias = mlp.fc1.bias + offset
    mlp.fc2.bias = mlp.fc2.bias - mlp.fc2.weight @ offset

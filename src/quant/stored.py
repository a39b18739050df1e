"""A quantized layer as tensors to keep, and back: what MLX's own layer reads, and the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..backends import Weight
from .artifacts import LayerConfig
from .linear import QuantizedLinear, Runtime
from .packing import affine_scales

VECTORS = ("a_scale", "a_bits", "shift", "smoothing", "low_rank_down", "low_rank_up")


@dataclass(frozen=True)
class StoredLayer:
    """The tensors of one layer, by the names that they have below its path.

    `affine` is what nn.QuantizedLinear reads: weight, scales, biases and bias. `own` is what it
    does not know: the activation grid (a_scale and a_bits per step, coarse), shift, smoothing,
    the low-rank branch, and the bias where it changes over the steps.
    """

    bits: int
    groups: int  # of scales in a row; MLX's are more where there is one only
    group_size: int  # MLX's
    affine: dict[str, mx.array]
    own: dict[str, mx.array]


def store_layer(layer: QuantizedLinear) -> StoredLayer:
    """The layer's tensors; nothing is rounded."""
    weight = Weight(layer.weight, layer.scales, layer.bits)
    scales, biases, size = affine_scales(weight)
    affine = {"weight": layer.weight, "scales": scales, "biases": biases}
    own = {name: layer[name] for name in VECTORS if name in layer}
    if layer.grid is not None and layer.grid.coarse > 1:
        own["coarse"] = mx.array([layer.grid.coarse, layer.grid.coarse_sides])
    if "bias" in layer:
        table = layer.bias
        kept = (affine, table[0]) if len(table) == 1 else (own, table)
        kept[0]["bias"] = kept[1]
    return StoredLayer(weight.bits, weight.groups, size, affine, own)


def restore_layer(
    bits: int,
    groups: int,
    affine: Mapping[str, mx.array],
    own: Mapping[str, mx.array],
    runtime: Runtime,
    dtype: mx.Dtype,
) -> QuantizedLinear:
    """The layer that was stored; `dtype` is what the 16-bit model computes in."""
    scales = affine["scales"]
    # A copy, so that the repeated scales are let go.
    scales = mx.contiguous(scales[:, :: scales.shape[1] // groups])
    bias = own["bias"] if "bias" in own else affine["bias"][None] if "bias" in affine else None
    thin = ("low_rank_down", "low_rank_up")
    return QuantizedLinear(
        Weight(affine["weight"], scales, bits),
        bias=bias,
        grid=stored_grid(own),
        smoothing=own.get("smoothing"),
        low_rank=tuple(own[name] for name in thin) if thin[0] in own else None,
        dtype=dtype,
        runtime=runtime,
    )


def own_shapes(rows: int, columns: int) -> dict[str, tuple[int | None, ...]]:
    """Shapes of what `own` may hold, for a (rows, columns) weight; None is any length."""
    return {
        "a_scale": (None,),
        "a_bits": (None,),
        "shift": (None, columns),
        "smoothing": (columns,),
        "low_rank_down": (None, columns),
        "low_rank_up": (rows, None),
        "coarse": (2,),
        "bias": (None, rows),
    }


def stored_grid(own: Mapping[str, mx.array]) -> LayerConfig | None:
    """The activation grid among a layer's tensors; none where its input stays in floats."""
    if "a_scale" not in own:
        return None
    coarse, sides = own["coarse"].tolist() if "coarse" in own else (1, 1)
    return LayerConfig(
        bits=own["a_bits"].tolist(),
        scale=own["a_scale"].tolist(),
        shift=np.array(own["shift"]) if "shift" in own else None,
        coarse=coarse,
        coarse_sides=sides,
    )

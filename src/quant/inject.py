"""Quantized layers into a model, by path: all is checked before the first layer changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..backends import Backend
from ..errors import UserError
from .artifacts import LayerConfig, QuantConfig, RoundedLayer
from .grid import code_range
from .linear import TYPICAL_ROWS, QuantizedLinear, Runtime, check_shapes, same_vector
from .schedule import Schedule, Step


@dataclass(frozen=True)
class Injected:
    """What a model was given; `notes` are for the user, one line each."""

    layers: list[str]
    step: Step | None
    notes: list[str] = field(default_factory=list)


def inject(
    model: nn.Module,
    layers: Mapping[str, RoundedLayer],
    *,
    bits: int = 4,
    config: QuantConfig | None = None,
    a_scale: str = "static",
    backend: Backend | None = None,
    rows: int = TYPICAL_ROWS,
    weights_only: bool = False,
) -> Injected:
    """Puts rounded layers in the place of the model's linears of the same paths.

    Without a config, or with `weights_only`, the activations stay in 16 bits; weights that were
    rounded with a config need it there too, since it holds the shift that their biases are for. A
    model whose activations are quantized tells the layers its noise level: it needs a method
    `follow`.
    """
    linears = linears_at(model, layers)
    for path, rounded in layers.items():
        check_layer(path, linears[path], rounded, bits)
    notes, grids = [], {}
    if config is None:
        notes.append(f"no quant config: activations stay in 16 bits (W{bits}A16)")
    else:
        grids, notes = usable_grids(layers, linears, config)
    step = Step(Schedule(tuple(config.sigmas))) if config is not None else None
    runtime = Runtime(step, a_scale, backend, rows, weights_only)
    quantized = [
        (
            path,
            QuantizedLinear.from_artifacts(
                linears[path], rounded, bits=bits, grid=grids.get(path), runtime=runtime
            ),
        )
        for path, rounded in layers.items()
    ]
    model.update_modules(tree_unflatten(quantized))
    if step is not None:
        model.follow(step)
    return Injected(list(layers), step, notes)


def linears_at(model: nn.Module, layers: Mapping[str, RoundedLayer]) -> dict[str, nn.Linear]:
    """The model's linears of these paths; a path that matches none is an error."""
    if not layers:
        raise UserError("the rounded weights name no layer; round the model's blocks first")
    linears = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    if unknown := sorted(set(layers) - set(linears)):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(
            f"the model has no linear {unknown[0]!r}{more}, which the rounded weights name; give "
            "the model that they were made from"
        )
    return {path: linears[path] for path in layers}


def check_layer(path: str, linear: nn.Linear, rounded: RoundedLayer, bits: int) -> None:
    """Raises, with the path, for codes or vectors that are not this linear's."""
    try:
        check_shapes(linear, rounded)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    low, high = code_range(bits)
    least, most = int(rounded.codes.min()), int(rounded.codes.max())
    if least < low or most > high:
        raise UserError(
            f"{path}: codes go from {least} to {most}, at {bits} bits they are {low} to {high}; "
            "use weights of one run of adaround_optimize"
        )


def usable_grids(
    layers: Mapping[str, RoundedLayer], linears: Mapping[str, nn.Linear], config: QuantConfig
) -> tuple[dict[str, LayerConfig], list[str]]:
    """Every layer's activation grid, without smoothing where the weight was not rounded with it."""
    if missing := sorted(set(layers) - set(config.layers)):
        raise UserError(
            f"the quant config has no layer {missing[0]!r} ({len(missing)} are missing); analyze "
            "this model's activations"
        )
    grids, left_out = {}, []
    for path, rounded in layers.items():
        grid = config.layers[path]
        check_vectors(path, grid, linears[path].weight.shape[1])
        if not same_vector(grid.smoothing, rounded.smoothing):
            if rounded.smoothing is not None:
                raise UserError(
                    f"{path} was rounded with a smoothing that is not the quant config's; give "
                    "the quant config that adaround_optimize was given, or round again with this"
                )
            grid = unsmoothed(grid)
            left_out.append(path)
        grids[path] = grid
    notes = []
    if left_out:
        notes.append(
            f"smoothing of {len(left_out)} layers is left out, since their weights were rounded "
            f"without it (first: {left_out[0]}); round with --quant-config to use it"
        )
    return grids, notes


def check_vectors(path: str, grid: LayerConfig, columns: int) -> None:
    for name in ("shift", "smoothing"):
        vector = getattr(grid, name)
        if vector is not None and vector.shape[-1] != columns:
            raise UserError(
                f"{name} of {path} in the quant config has {vector.shape[-1]} channels, the layer "
                f"has {columns}; analyze this model's activations"
            )


def unsmoothed(grid: LayerConfig) -> LayerConfig:
    """The same tiers for an input that nothing divides.

    A value that just reached the range did so in some channel: without the division it may be as
    wide as the widest factor makes it, so the range grows by that.
    """
    widest = float(np.max(grid.smoothing))
    return replace(grid, scale=[scale * widest for scale in grid.scale], smoothing=None)

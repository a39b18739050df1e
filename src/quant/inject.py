"""Quantized layers into a model, by path: all is checked before the first layer changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..backends import Backend
from ..backends.weight import check_mlx_bits
from ..errors import UserError
from .artifacts import LayerConfig, QuantConfig, RoundedLayer
from .grid import code_range, dequantize
from .linear import TYPICAL_ROWS, QuantizedLinear, Runtime, check_shapes, same_vector
from .schedule import Schedule, Step

RowsOf = Callable[[str], int]  # from a layer's path


@dataclass(frozen=True)
class Checked:
    """Layers that fit a model, with all of their grids: nothing is left that could be refused."""

    layers: Mapping[str, RoundedLayer]
    bits: int
    config: QuantConfig | None = None
    grids: Mapping[str, LayerConfig] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


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
    folded: bool = True,
    a_scale: str = "static",
    backend: Backend | None = None,
    rows: int | RowsOf = TYPICAL_ROWS,
    weights_only: bool = False,
) -> Injected:
    """Puts rounded layers in the place of the model's linears of the same paths.

    Without a config, or with `weights_only`, the activations stay in 16 bits; weights that were
    rounded with a config need it there too, since it holds the shift that their biases are for:
    `folded` says that they were rounded with this one. A model whose activations are quantized
    tells the layers its noise level: it needs a method `follow`. Without a backend each layer gets
    the one that is fastest for its shape and `rows`, the tokens that it meets at once.
    """
    checked = check_layers(model, layers, bits=bits, config=config, folded=folded)
    return put_in(
        model, checked, a_scale=a_scale, backend=backend, rows=rows, weights_only=weights_only
    )


def check_layers(
    model: nn.Module,
    layers: Mapping[str, RoundedLayer],
    *,
    bits: int = 4,
    config: QuantConfig | None = None,
    folded: bool = True,
) -> Checked:
    """Refuses what does not fit the model, which stays as it is."""
    check_mlx_bits(bits)
    linears = linears_at(model, layers)
    for path, rounded in layers.items():
        check_layer(path, linears[path], rounded, bits)
    if config is None:
        note = f"no quant config: activations stay in 16 bits (W{bits}A16)"
        return Checked(layers, bits, notes=[note])
    grids, notes = usable_grids(layers, linears, config)
    if not folded:
        layers = {
            path: without_shift(linears[path], rounded, grids[path].shift)
            for path, rounded in layers.items()
        }
    return Checked(layers, bits, config, grids, notes)


def put_in(
    model: nn.Module,
    checked: Checked,
    *,
    a_scale: str = "static",
    backend: Backend | None = None,
    rows: int | RowsOf = TYPICAL_ROWS,
    weights_only: bool = False,
) -> Injected:
    """The layers into the model that they were checked against."""
    linears = linears_at(model, checked.layers)
    step = None if checked.config is None else Step(Schedule(tuple(checked.config.sigmas)))
    runtime = Runtime(step, a_scale, backend, weights_only=weights_only)
    quantized = [
        (
            path,
            QuantizedLinear.from_artifacts(
                linears[path],
                rounded,
                bits=checked.bits,
                grid=checked.grids.get(path),
                runtime=replace(runtime, rows=rows if isinstance(rows, int) else rows(path)),
            ),
        )
        for path, rounded in checked.layers.items()
    ]
    model.update_modules(tree_unflatten(quantized))
    if step is not None:
        model.follow(step)
    return Injected(list(checked.layers), step, checked.notes)


@contextmanager
def injected(model: nn.Module, checked: Checked, **runtime: Any) -> Iterator[Injected]:
    """The same while the context lasts: the model's own linears come back whatever happens."""
    linears = linears_at(model, checked.layers)
    try:
        yield put_in(model, checked, **runtime)
    finally:
        put_back(model, linears)


def put_back(model: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
    """The 16-bit linears in the place of the quantized ones; no layer hears of the step."""
    model.update_modules(tree_unflatten(list(linears.items())))
    model.follow(None)


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
            grid = grid.unsmoothed()
            left_out.append(path)
        grids[path] = grid
    notes = []
    if left_out:
        notes.append(
            f"smoothing of {len(left_out)} layers is left out, since their weights were rounded "
            f"without it (first: {left_out[0]}); round with --quant-config to use it"
        )
    return grids, notes


def without_shift(
    linear: nn.Linear, rounded: RoundedLayer, shift: np.ndarray | None
) -> RoundedLayer:
    """The layer's bias for a shift that it was not rounded with.

    Rounding corrected the bias for the mean of the whole input x; of x − z it is less by what
    rounding does to z: (W − Ŵ)·z.
    """
    if rounded.bias is None or shift is None:
        return rounded
    weight = np.array(linear.weight.astype(mx.float32), dtype=np.float64)
    error = weight - np.array(dequantize(mx.array(rounded.codes), mx.array(rounded.scale)))
    moved = np.atleast_2d(shift).mean(axis=0, dtype=np.float64) @ error.T
    return replace(rounded, bias=(rounded.bias - moved).astype(np.float32))


def check_vectors(path: str, grid: LayerConfig, columns: int) -> None:
    for name in ("shift", "smoothing"):
        vector = getattr(grid, name)
        if vector is not None and vector.shape[-1] != columns:
            raise UserError(
                f"{name} of {path} in the quant config has {vector.shape[-1]} channels, the layer "
                f"has {columns}; analyze this model's activations"
            )

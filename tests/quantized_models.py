"""Quantized pipelines for tests: every block linear rounded to the nearest codes."""

from __future__ import annotations

from src.backends import named
from src.inference.modulation import quantize_modulation
from src.models.load import load_pipeline
from src.models.paths import block_linears
from src.models.pipeline import Pipeline
from src.quant.artifacts import LayerConfig
from src.quant.linear import QuantizedLinear, Runtime
from src.quant.schedule import Schedule, Step
from src.sampling import sd3_sigmas

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

STEPS = 10
SIGMAS = tuple(float(s) for s in sd3_sigmas(STEPS)[:-1])


def grid_of(path: str, columns: int, *, smoothing: bool, shifts: int, coarse: int) -> LayerConfig:
    """Tiers and scales that change over the steps; fc2 has shifts and codes of two regions."""
    rng = np.random.default_rng(columns)
    fc2 = path.endswith("fc2")
    shift = rng.normal(0, 0.1, (shifts, columns)).astype(np.float32) if fc2 and shifts else None
    return LayerConfig(
        bits=[8] * 5 + [6] * 5,
        scale=np.geomspace(0.06, 0.2, STEPS).tolist(),
        shift=shift[0] if shift is not None and shifts == 1 else shift,
        smoothing=rng.uniform(0.5, 2, columns).astype(np.float32) if smoothing else None,
        coarse=coarse if fc2 else 1,
    )


def quantized_pipeline(
    model: str = "tiny",
    *,
    bits: int = 4,
    group_size: int = 0,
    activations: bool = True,
    a_scale: str = "static",
    weights_only: bool = False,
    smoothing: bool = False,
    shifts: int = 1,
    coarse: int = 1,
    low_rank: int = 0,
    modulation: bool = True,
    kernel: str | None = None,
) -> Pipeline:
    """The model with all block linears quantized, and its modulation where that is asked for."""
    pipeline = load_pipeline(model)
    step = Step(Schedule(SIGMAS)) if activations else None
    backend = None if kernel is None else named(kernel)
    runtime = Runtime(step, a_scale, backend, weights_only=weights_only)
    layers = []
    for path, linear in block_linears(pipeline.transformer).items():
        rows, columns = linear.weight.shape
        grid = grid_of(path, columns, smoothing=smoothing, shifts=shifts, coarse=coarse)
        key = mx.random.key(0)
        thin = tuple(0.01 * mx.random.normal(s, key=key) for s in ((2, columns), (rows, 2)))
        layer = QuantizedLinear.from_linear(
            linear,
            bits=bits,
            group_size=group_size,
            grid=grid if activations else None,
            low_rank=thin if low_rank else None,
            runtime=runtime,
        )
        layers.append((path, layer))
    pipeline.transformer.update_modules(tree_unflatten(layers))
    pipeline.transformer.follow(step)
    if modulation:
        quantize_modulation(pipeline.transformer)
    return pipeline

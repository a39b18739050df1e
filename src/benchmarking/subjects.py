"""The models that take turns: the one in floats, and its codes under every kernel.

All share what they do not change: each has a transformer of its own with the others' arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..backends import Backend, Weight, named
from ..errors import UserError
from ..inference.kernels import join, rows_of
from ..inference.open import Settings, activations, open_artifacts
from ..inference.saved import is_saved, load_saved, table_schedule
from ..models.load import MODELS, Model, ModelChoice, load_pipeline
from ..models.mmdit import MMDiT
from ..models.paths import block_linears
from ..models.pipeline import Pipeline
from ..quant.artifacts import LayerConfig, QuantConfig
from ..quant.inject import check_vectors
from ..quant.linear import QuantizedLinear, Runtime
from ..quant.loading import check_config
from ..quant.schedule import Schedule, Step

SCALE = 0.05  # of inputs, where there is no quant config: times do not depend on it
BITS = 8  # of inputs, likewise
KEEPS_NOTHING = "reference"  # beside the packed codes


@dataclass(frozen=True)
class Codes:
    """Where the weights' codes and the inputs' grids come from; none: nearest codes."""

    adaround_output: str | Path | None = None
    quant_config: str | Path | None = None


@dataclass(frozen=True)
class Subject:
    """A model in floats and the same on codes; `notes` are for the user."""

    source: Model  # what opens the one in floats
    exact: Pipeline
    quantized: Pipeline
    weights: str  # where the codes are from
    notes: list[str]

    @property
    def name(self) -> str:
        """Such as W4A8."""
        layers = quantized_layers(self.quantized.transformer)
        grids = {path: layer.grid for path, layer in layers.items()}
        weights_only = next(iter(layers.values())).runtime.weights_only
        config = None
        if None not in grids.values():
            config = QuantConfig({}, [], [], grids)
        return f"{self.weight_name}{activations(config, weights_only)}"

    @property
    def weight_name(self) -> str:
        """Such as W4."""
        layers = quantized_layers(self.quantized.transformer).values()
        return "W" + "/".join(str(bits) for bits in sorted({layer.bits for layer in layers}))

    @property
    def packed_bytes(self) -> int:
        """Of all codes."""
        layers = quantized_layers(self.quantized.transformer).values()
        return sum(layer.weight.nbytes for layer in layers)

    @property
    def a_scale(self) -> str:
        """Of the layers as they were opened."""
        return next(iter(quantized_layers(self.quantized.transformer).values())).runtime.a_scale


def open_subject(
    model: Model, dtype: mx.Dtype | None, codes: Codes, num_steps: int | None
) -> Subject:
    """Reads and checks; kernels come later."""
    if is_saved(model):
        return saved_subject(model, dtype, codes)
    exact = load_pipeline(model, dtype)
    if codes.adaround_output is None:
        quantized = nearest(exact, codes.quant_config, num_steps)
        grids = "one scale" if codes.quant_config is None else str(codes.quant_config)
        return Subject(model, exact, quantized, f"nearest codes, {grids}", [])
    settings = Settings(kernel=KEEPS_NOTHING)
    copy = with_layers(exact, {})
    artifacts = open_artifacts(copy, codes.adaround_output, codes.quant_config, settings)
    return Subject(
        model,
        exact,
        artifacts.inject().pipeline,
        f"{codes.adaround_output}, "
        + ("no quant config" if codes.quant_config is None else str(codes.quant_config)),
        artifacts.notes,
    )


def saved_subject(model: Model, dtype: mx.Dtype | None, codes: Codes) -> Subject:
    """A saved quantized model beside the one that it was made from."""
    for option, given in (
        ("--adaround-output", codes.adaround_output),
        ("--quant-config", codes.quant_config),
    ):
        if given is not None:
            raise UserError(
                f"{option} {given}: {model} has codes and grids of its own; leave it out"
            )
    quantized = load_saved(model, dtype, kernel=KEEPS_NOTHING)
    if quantized.name not in MODELS:
        raise UserError(
            f"{model} was made from {quantized.name}, which is none of {', '.join(MODELS)}; give "
            "that model's folder, with --adaround-output"
        )
    choice: Model = quantized.name
    if isinstance(model, ModelChoice):
        choice = replace(model, name=quantized.name)
    return Subject(choice, load_pipeline(choice, dtype), quantized, str(model), [])


def nearest(exact: Pipeline, quant_config: str | Path | None, num_steps: int | None) -> Pipeline:
    """4-bit nearest codes in all block linears, with the config's grids or one grid for all."""
    linears, layers = block_linears(exact.transformer), {}
    if quant_config is None:
        sigmas = exact.sigmas(num_steps)[:-1].tolist()
        grids = dict.fromkeys(linears, LayerConfig([BITS] * len(sigmas), [SCALE] * len(sigmas)))
    else:
        config = QuantConfig.load(quant_config)
        check_config(quant_config, config, exact.name, exact.hash)
        sigmas, grids = config.sigmas, own_grids(linears, config)
    step = Step(Schedule(tuple(sigmas)))
    runtime = Runtime(step, backend=named(KEEPS_NOTHING))
    for path, linear in linears.items():
        layers[path] = QuantizedLinear.from_linear(linear, grid=grids[path], runtime=runtime)
        mx.eval(layers[path].parameters())  # one after the other: each is in float32 for a while
    return with_layers(exact, layers, step)


def own_grids(linears: Mapping[str, nn.Linear], config: QuantConfig) -> dict[str, LayerConfig]:
    """The config's grid of every layer; one that is missing or does not fit is an error."""
    if missing := [path for path in linears if path not in config.layers]:
        raise UserError(
            f"the quant config has no layer {missing[0]!r} ({len(missing)} are missing); analyze "
            "this model's activations"
        )
    for path, linear in linears.items():
        check_vectors(path, config.layers[path], linear.weight.shape[1])
    return {path: config.layers[path] for path in linears}


def with_kernel(
    quantized: Pipeline, backend: Backend | None, a_scale: str, joined: bool = True
) -> tuple[Pipeline, Step | None]:
    """The same codes multiplied by another backend, and the step that its layers follow.

    Without a backend each layer takes the one that suits it, at the pipeline's size. Layers that
    are to be wrapped share no work, and so are not `joined`.
    """
    transformer = quantized.transformer
    old = quantized_layers(transformer)
    schedule = table_schedule(transformer)
    step = None if schedule is None else Step(schedule)
    weights_only = next(iter(old.values())).runtime.weights_only
    runtime = Runtime(step, a_scale, backend, weights_only=weights_only)
    rows = rows_of(transformer.config, quantized.defaults)
    layers = {
        path: again(layer, quantized.dtype, replace(runtime, rows=rows(path)))
        for path, layer in old.items()
    }
    made = with_layers(quantized, layers, step)
    if joined:
        join(made.transformer)
    return made, step


def again(layer: QuantizedLinear, dtype: mx.Dtype, runtime: Runtime) -> QuantizedLinear:
    """The layer made once more; its codes are not copied."""
    thin = (layer.low_rank_down, layer.low_rank_up) if "low_rank_up" in layer else None
    return QuantizedLinear(
        Weight(layer.weight, layer.scales, layer.bits),
        bias=layer.get("bias"),
        grid=layer.grid,
        smoothing=layer.get("smoothing"),
        low_rank=thin,
        dtype=dtype,
        runtime=runtime,
    )


def with_layers(
    pipeline: Pipeline, layers: Mapping[str, nn.Module], step: Step | None = None
) -> Pipeline:
    """A pipeline whose transformer has these layers, and all else from the one that is given."""
    old = pipeline.transformer
    kept = {p: m for p, m in old.named_modules() if isinstance(m, nn.QuantizedLinear)}
    new = MMDiT(old.config)
    new.update_modules(tree_unflatten(list({**kept, **layers}.items())))
    weights = tree_flatten(old.parameters())
    own = [(name, array) for name, array in weights if name.rpartition(".")[0] not in layers]
    new.load_weights(own, strict=False)
    new.follow(step)
    return replace(pipeline, transformer=new)


def quantized_layers(transformer: MMDiT) -> dict[str, QuantizedLinear]:
    """By path."""
    return {p: m for p, m in transformer.named_modules() if isinstance(m, QuantizedLinear)}


def parameter_bytes(transformer: MMDiT) -> int:
    """Of all that the transformer holds but what a kernel has made for itself."""
    arrays: dict[int, Any] = {id(a): a for _, a in tree_flatten(transformer.parameters())}
    return sum(array.nbytes for array in arrays.values())

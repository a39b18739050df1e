"""The ladder: what each part of the method gives, from nearest rounding to both tracks' results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import mlx.nn as nn
import numpy as np

from ..calibration.activations import ActivationStatistics
from ..metrics.fidelity import Reference, bootstrap_interval, teacher_forced_sqnr
from ..models.mmdit import MMDiT
from ..models.paths import block_linears, input_of
from ..quant.artifacts import LayerConfig, QuantConfig, RoundedLayer
from ..quant.grid import absmax_scale, activation_limit, nearest_codes
from ..quant.inject import Checked, check_layers, injected
from ..report.content import Rung
from .open import Artifacts, activations

RTN_BITS_A = 8


def ladder(
    artifacts: Artifacts,
    references: Sequence[Reference],
    largest: Mapping[str, float] | None = None,
    done: Callable[[], object] = lambda: None,
) -> list[Rung]:
    """Teacher-forced dB of the guided velocity, mean over steps, with intervals over captions.

    The artifacts' model must still be the 16-bit one, and is so afterwards. Each of the references
    holds some captions, as many as fit in memory at once. `largest` is each input's largest
    absolute value over all steps, by path: without it the first rung, which has one scale for all
    of them, is left out. `done` is called after each rung.
    """
    model, rungs = artifacts.pipeline.transformer, []
    for name, checked, runtime in rungs_of(artifacts, largest):
        with injected(model, checked, **runtime):
            tables = [teacher_forced_sqnr(model, reference) for reference in references]
        values = np.concatenate(tables, axis=1).mean(axis=0)
        rungs.append(Rung(name, float(values.mean()), *bootstrap_interval(values)))
        done()
    return rungs


def rung_count(artifacts: Artifacts, largest: Mapping[str, float] | None) -> int:
    return 2 + (largest is not None) + 2 * (artifacts.config is not None)


Runtime = dict[str, object]


def rungs_of(
    artifacts: Artifacts, largest: Mapping[str, float] | None
) -> Iterator[tuple[str, Checked, Runtime]]:
    """Each rung's name, its layers and how they run, one after the other for memory's sake."""
    model, bits = artifacts.pipeline.transformer, artifacts.rounded.bits
    nearest = nearest_layers(model, bits)
    if largest is not None:
        config = one_scale_config(model, largest)
        checked = check_layers(model, nearest, bits=bits, config=config)
        yield f"RTN W{bits}A{RTN_BITS_A}, one scale", checked, {}
    yield f"RTN W{bits}A16", check_layers(model, nearest, bits=bits), {}
    del nearest
    config, ours = artifacts.config, artifacts.checked
    yield f"ours W{bits}A16", ours, {"weights_only": True}
    if config is not None:
        name = f"ours W{bits}{activations(config)}"
        yield f"{name} per token", ours, {"a_scale": "token"}
        yield f"{name} static", ours, {}


def nearest_layers(model: MMDiT, bits: int) -> dict[str, RoundedLayer]:
    """Every block linear with its nearest codes, one unclipped scale an output channel."""
    return {path: nearest_layer(linear, bits) for path, linear in block_linears(model).items()}


def nearest_layer(linear: nn.Linear, bits: int) -> RoundedLayer:
    scale = absmax_scale(linear.weight, bits)
    codes = np.array(nearest_codes(linear.weight, scale, bits))
    return RoundedLayer(codes, np.array(scale), np.ones(1, np.float32))


def one_scale_config(model: MMDiT, largest: Mapping[str, float]) -> QuantConfig:
    """Eight bits with one scale for all steps, that of the largest value ever met."""
    limit = activation_limit(RTN_BITS_A)
    layers = {
        path: LayerConfig([RTN_BITS_A], [float(np.float32(largest[input_of(path)] / limit))])
        for path in block_linears(model)
    }
    return QuantConfig({}, [0], [1.0], layers)


def largest_inputs(folder: Path, config: QuantConfig) -> dict[str, float] | None:
    """Each input's largest absolute value over all steps, where the statistics that the config
    was made from lie in that folder."""
    if not (folder / "manifest.json").is_file():
        return None
    found = ActivationStatistics.open(folder)
    if found.hash != config.made_from.get("statistics_hash"):
        return None
    return {path: float(inputs.absmax.max()) for path, inputs in found.inputs.items()}

"""Rounds one block: the ladder from nearest rounding to learned rounding, and the guard on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from .bias_correction import bias_correction
from .gptq import gptq_codes
from .grid import (
    absmax_scale,
    activation_limit,
    dequantize,
    guarded_scale,
    nearest_codes,
)
from .learning import Learning, Steps, learn_rounding
from .observe import InputStatistics, input_statistics
from .qdrop import ActivationGrid
from .rounding import RectifiedSigmoid, StraightThrough
from .standin import BlockData, StandInBlock, channel_power, stream_errors

LADDER = ("rtn", "grid", "gptq")  # computed one after the other, each from the one before
LEARNED = {"adaround": RectifiedSigmoid, "ste": StraightThrough}
METHODS = (*LADDER, *LEARNED)
MEASURED_ROWS = 128  # on which every rung's error is measured


@dataclass(frozen=True)
class RoundingSettings:
    """What decides the codes of a block."""

    method: str = "ste"
    bits: int = 4
    activation_bits: int = 8
    group_size: int = 0
    learning: Learning = field(default_factory=Learning)
    correct_bias: bool = True


@dataclass(frozen=True)
class Candidate:
    """One way to round a block."""

    codes: dict[str, mx.array]
    scales: dict[str, mx.array]
    error: float  # of the block's output, see `output_error`


@dataclass(frozen=True)
class RoundedBlock:
    """The codes that were kept, and what each rung would have given."""

    codes: dict[str, mx.array]
    scales: dict[str, mx.array]
    corrections: dict[str, mx.array]  # to add to each bias
    activations: dict[str, ActivationGrid]
    kept: str  # the rung that the codes are from
    error_db: dict[str, float]  # signal to error of the block's output, by rung
    moved: float  # share of codes that are not the nearest
    undecided: float  # share of soft values that learning left between two codes


def round_block(
    block: StandInBlock,
    data: BlockData,
    settings: RoundingSettings,
    activations: dict[str, ActivationGrid] | None = None,
    step_keys: int = 1,
    compiled_steps: Steps | None = None,
) -> RoundedBlock:
    """Rounds the block's weights; `activations` are found from the data where they are not given.

    `step_keys` is how many the data has; `compiled_steps` is what blocks of one shape share.
    """
    masters, measured = block.masters(), data.spaced(MEASURED_ROWS)
    statistics = input_statistics(block, data, settings.learning.batch_size)
    if activations is None:
        activations = absmax_grids(statistics, data.step, step_keys, settings.activation_bits)
    rungs = ladder(block, measured, settings, statistics)
    undecided = 0.0
    if settings.method in LEARNED:
        rungs[settings.method], undecided = learned(
            block, data, measured, settings, rungs, activations, compiled_steps
        )
    kept = chosen(rungs, settings.method)
    best = rungs[kept]
    corrections = {}
    if settings.correct_bias:
        corrections = corrected(block, measured, best, statistics, settings.learning.batch_size)
    return RoundedBlock(
        codes=best.codes,
        scales=best.scales,
        corrections=corrections,
        activations=activations,
        kept=kept,
        error_db={name: decibel(rung.error) for name, rung in rungs.items()},
        moved=moved_share(masters, best, settings.bits),
        undecided=undecided,
    )


def ladder(
    block: StandInBlock,
    data: BlockData,
    settings: RoundingSettings,
    statistics: dict[str, InputStatistics],
) -> dict[str, Candidate]:
    """The rungs that need no learning, up to the method that was asked for."""
    masters, bits, group = block.masters(), settings.bits, settings.group_size
    last = LADDER.index(settings.method) if settings.method in LADDER else len(LADDER) - 1
    absmax = {p: absmax_scale(w, bits, group) for p, w in masters.items()}
    scales = dict(absmax)
    if last >= 1:
        for path, weight in masters.items():
            scales[path] = guarded_scale(weight, bits, group, statistics[path].hessian)
    rungs = {}
    for name in LADDER[: last + 1]:
        own = absmax if name == "rtn" else scales
        if name == "gptq":
            codes = gptq_by_input(masters, own, bits, statistics)
        else:
            codes = {p: nearest_codes(w, own[p], bits) for p, w in masters.items()}
        mx.eval(codes, own)
        error = output_error(block, data, codes, own, settings.learning.batch_size)
        rungs[name] = Candidate(codes, own, error)
    return rungs


def gptq_by_input(
    masters: dict[str, mx.array],
    scales: dict[str, mx.array],
    bits: int,
    statistics: dict[str, InputStatistics],
) -> dict[str, mx.array]:
    """GPTQ's codes; linears that read the same input are rounded as one, by one factor."""
    groups: dict[int, list[str]] = {}
    for path in masters:
        groups.setdefault(id(statistics[path]), []).append(path)
    codes = {}
    for paths in groups.values():
        weight = mx.concatenate([masters[p] for p in paths])
        scale = mx.concatenate([scales[p] for p in paths])
        both = gptq_codes(weight, scale, bits, statistics[paths[0]].hessian)
        ends = np.cumsum([len(masters[p]) for p in paths])[:-1].tolist()
        codes |= dict(zip(paths, mx.split(both, ends), strict=True))
    return {path: codes[path] for path in masters}


def learned(
    block: StandInBlock,
    data: BlockData,
    measured: BlockData,
    settings: RoundingSettings,
    rungs: dict[str, Candidate],
    activations: dict[str, ActivationGrid],
    compiled_steps: Steps | None,
) -> tuple[Candidate, float]:
    """Learned rounding from the better of GPTQ and nearest rounding."""
    first = min(("gptq", "grid"), key=lambda name: rungs[name].error)
    start = rungs[first]
    # From nearest codes the published start is the weight itself.
    share = 1.0 if first == "grid" and settings.method == "adaround" else 0.5
    result = learn_rounding(
        block,
        data,
        start.codes,
        start.scales,
        LEARNED[settings.method](settings.bits),
        settings.learning,
        activations,
        share=share,
        steps=compiled_steps,
    )
    error = output_error(block, measured, result.codes, start.scales, settings.learning.batch_size)
    return Candidate(result.codes, start.scales, error), result.undecided


def chosen(rungs: dict[str, Candidate], method: str) -> str:
    """The method that was asked for, unless a lower rung has less error."""
    best = min(rungs, key=lambda name: rungs[name].error)
    return method if rungs[method].error <= rungs[best].error else best


def output_error(
    block: StandInBlock,
    data: BlockData,
    codes: dict[str, mx.array],
    scales: dict[str, mx.array],
    batch_size: int,
    corrections: dict[str, mx.array] | None = None,
) -> float:
    """Power of the error over power of the target, mean over channels, then over streams."""
    masters, biases = block.masters(), block.biases()
    power, total = channel_power(data, batch_size), 0.0
    try:
        block.set_weights({p: dequantize(codes[p], scales[p]) for p in codes})
        block.add_biases(corrections or {})
        for chunk in data.chunks(batch_size):
            errors = stream_errors(block(chunk), chunk.targets, power)
            total += (sum(errors) / len(errors)).item() * len(chunk)
    finally:
        block.set_weights(masters)
        block.set_biases(biases)
    return total / len(data)


def corrected(
    block: StandInBlock,
    data: BlockData,
    best: Candidate,
    statistics: dict[str, InputStatistics],
    batch_size: int,
) -> dict[str, mx.array]:
    """Bias corrections of all layers, or none where they do not lessen the block's error."""
    masters = block.masters()
    found = {
        path: bias_correction(
            weight, dequantize(best.codes[path], best.scales[path]), statistics[path].mean
        )
        for path, weight in masters.items()
    }
    mx.eval(found)
    error = output_error(block, data, best.codes, best.scales, batch_size, found)
    return found if error < best.error else {}


def absmax_grids(
    statistics: dict[str, InputStatistics], step: mx.array, steps: int, bits: int
) -> dict[str, ActivationGrid]:
    """Scales that clip nothing, one per step: clipping inside the loop is worse than rounding."""
    limit = activation_limit(bits)
    grids = {}
    for path, own in statistics.items():
        largest = own.absmax_per_step(step, steps)
        scale = mx.maximum(largest / limit, 1e-12)
        grids[path] = ActivationGrid(scale, mx.full((steps,), limit))
    mx.eval([grid.scale for grid in grids.values()])
    return grids


def moved_share(masters: dict[str, mx.array], best: Candidate, bits: int) -> float:
    """Share of codes that are not the nearest on their grid."""
    moved = sum(
        mx.sum(best.codes[p] != nearest_codes(w, best.scales[p], bits)).item()
        for p, w in masters.items()
    )
    return moved / sum(w.size for w in masters.values())


def decibel(ratio: float) -> float:
    """Signal to error in dB of an error ratio; a perfect block has 200."""
    return -10 * math.log10(max(ratio, 1e-20))


def with_seed(settings: RoundingSettings, seed: int) -> RoundingSettings:
    """The same settings, with a seed of their own for one block."""
    return replace(settings, learning=replace(settings.learning, seed=seed))

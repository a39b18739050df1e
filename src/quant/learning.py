"""The loop that learns the rounding of a whole block: minibatches, Adam, the best iterate kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..lanes import lanes
from .grid import dequantize, spread
from .qdrop import ActivationGrid, dropped_fake_quantize
from .rounding import Layer, Rounding, annealed_power, start_between
from .standin import BlockData, Power, StandInBlock, channel_power, stream_errors

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
CHECKED = (0.75, 1.0)  # shares of a run after which the hard rounding is judged
CHECK_ROWS = 32

Tree = dict[str, Any]
Step = Callable[..., tuple[Tree, Tree, mx.array]]


@dataclass(frozen=True)
class Learning:
    """How long and how fast."""

    iters: int = 1000
    batch_size: int = 8  # rows
    lr: float = 1e-2  # Adam's; falls to 0 where the rounding says so
    warmup: float = 0.2  # share of the run before the regulariser joins
    b_range: tuple[float, float] = (20.0, 2.0)
    reg: float = 0.01
    activations_from: float = 0.75  # share of the run after which activations are quantized
    seed: int = 0


@dataclass
class Learned:
    """The best hard rounding that was met."""

    codes: dict[str, mx.array]
    error: float  # over CHECK_ROWS rows, relative to the start's
    undecided: float = 0.0  # share of weights whose last soft value was not within 0.1 of a code
    history: list[float] = field(default_factory=list)


class Steps:
    """Makes the function of one iteration; where it is compiled, blocks of one shape share it."""

    def __init__(self, compiled: bool = False) -> None:
        self.compiled = compiled
        self._known: dict[Any, Step] = {}

    def get(self, block: StandInBlock, rounding: Rounding, grids: bool) -> Step:
        """The iteration for a block of this shape; `grids`: whether activations are quantized."""
        if not self.compiled:
            return make_step(block, rounding)
        shapes = tuple((k, v.shape) for k, v in tree_flatten(block.module.parameters()))
        key = (rounding, grids, shapes)
        if key not in self._known:
            self._known[key] = mx.compile(make_step(block, rounding))
        return self._known[key]


def learn_rounding(
    block: StandInBlock,
    data: BlockData,
    start: dict[str, mx.array],
    scales: dict[str, mx.array],
    rounding: Rounding,
    settings: Learning,
    activations: dict[str, ActivationGrid] | None = None,
    *,
    share: float = 0.5,
    steps: Steps | None = None,
) -> Learned:
    """Starts from codes `start`; the block's own weights are the masters."""
    fixed, masters = block.module.parameters(), block.masters()
    checked = data.spaced(CHECK_ROWS)
    layers, states = prepared(masters, start, scales, rounding, share)
    best = Learned(dict(start), 1.0)
    try:
        judge = Judge(block, checked, start, scales, channel_power(data, settings.batch_size))
        constants = {
            "fixed": fixed,
            "scale": {path: layer.scale for path, layer in layers.items()},
            "base": {path: layer.base for path, layer in layers.items()},
            "stream_weight": judge.stream_weight,
            "power": judge.power,
        }
        run = Run(block, data, rounding, settings, activations, constants, steps or Steps())
        train(run, layers, states, judge, best)
    finally:
        block.clear_hooks()
        block.module.update(fixed)
    return best


def prepared(
    masters: dict[str, mx.array],
    start: dict[str, mx.array],
    scales: dict[str, mx.array],
    rounding: Rounding,
    share: float,
) -> tuple[dict[str, Layer], Tree]:
    """Constants and first states of all layers."""
    layers, states = {}, {}
    for path, codes in start.items():
        first = start_between(masters[path], scales[path], codes, share)
        layer = Layer(scales[path], rounding.base(first))
        layers[path], states[path] = layer, rounding.state(first, layer)
    mx.eval(states)
    return layers, states


class Judge:
    """Hard rounding's error on some rows, relative to what it was at the start.

    Each stream counts by its own start, so that both weigh alike in every block.
    """

    def __init__(
        self,
        block: StandInBlock,
        rows: BlockData,
        codes: dict[str, mx.array],
        scales: dict[str, mx.array],
        power: Power,
    ) -> None:
        self.block, self.rows, self.scales, self.power = block, rows, scales, power
        errors = self.errors(codes)
        self.stream_weight = [1 / (len(errors) * mx.maximum(e, 1e-20)) for e in errors]
        mx.eval(self.stream_weight)

    def errors(self, codes: dict[str, mx.array]) -> list[mx.array]:
        self.block.clear_hooks()
        self.block.set_weights({p: dequantize(c, self.scales[p]) for p, c in codes.items()})
        return stream_errors(self.block(self.rows), self.rows.targets, self.power)

    def __call__(self, codes: dict[str, mx.array]) -> float:
        return weighted(self.stream_weight, self.errors(codes)).item()


def weighted(weights: list[mx.array], errors: list[mx.array]) -> mx.array:
    return sum(w * e for w, e in zip(weights, errors, strict=True))


@dataclass(frozen=True)
class Run:
    """All that a run needs beside its state."""

    block: StandInBlock
    data: BlockData
    rounding: Rounding
    settings: Learning
    activations: dict[str, ActivationGrid] | None
    constants: Tree
    steps: Steps

    def step(self, quantize: bool) -> tuple[Step, Tree]:
        """The iteration with or without quantized activations, and its constants."""
        constants = self.constants
        if quantize:
            grids = {p: (g.scale, g.limit) for p, g in self.activations.items()}
            constants = constants | {"grids": grids}
        return self.steps.get(self.block, self.rounding, quantize), constants


def train(run: Run, layers: dict[str, Layer], states: Tree, judge: Judge, best: Learned) -> None:
    """Runs all iterations and leaves the best hard rounding in `best`."""
    settings, rng = run.settings, np.random.default_rng(run.settings.seed)
    moments = {path: (mx.zeros_like(s), mx.zeros_like(s)) for path, s in states.items()}
    order = minibatches(len(run.data), settings.batch_size, settings.iters, rng)
    checks = {round(settings.iters * share) for share in CHECKED}
    before = mx.array(0.0)
    for iteration, rows in enumerate(order):
        done = iteration / settings.iters
        step, constants = run.step(
            run.activations is not None and done >= settings.activations_from
        )
        batch = run.data.rows(mx.array(rows)).arrays()
        key = mx.random.key(int(rng.integers(2**31)))
        states, moments, loss = step(
            constants,
            batch,
            states,
            moments,
            knobs_at(done, iteration, settings, run.rounding.rate_falls),
            key,
        )
        # The next iteration is prepared while this one computes, and no further ahead.
        mx.async_eval(states, moments, loss)
        mx.eval(before)
        before = loss
        if iteration + 1 in checks:
            codes = {p: run.rounding.codes(s, layers[p]).astype(mx.int8) for p, s in states.items()}
            run.block.module.update(run.constants["fixed"])
            best.history.append(judge(codes))
            if best.history[-1] < best.error:
                best.codes, best.error = codes, best.history[-1]
    best.undecided = undecided(run.rounding, layers, states)


def minibatches(rows: int, batch_size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, batch) row numbers: every row once before any comes again, as far as it goes."""
    size = min(batch_size, rows)
    if not count:
        return np.zeros((0, size), dtype=np.int64)
    drawn = [rng.permutation(rows) for _ in range(-(-count * size // rows))]
    return np.concatenate(drawn)[: count * size].reshape(count, size)


def knobs_at(done: float, iteration: int, settings: Learning, rate_falls: bool) -> Tree:
    """Rates and exponent of one iteration, as arrays, so that a compiled step takes them."""
    lr = settings.lr * (1 - done) if rate_falls else settings.lr
    correction = (1 - BETA_2 ** (iteration + 1)) ** 0.5 / (1 - BETA_1 ** (iteration + 1))
    return {
        "rate": mx.array(lr * correction),
        "power": mx.array(annealed_power(done, settings.warmup, *settings.b_range)),
        "reg": mx.array(settings.reg if done >= settings.warmup else 0.0),
    }


def make_step(block: StandInBlock, rounding: Rounding) -> Step:
    """One iteration: (constants, batch, states, moments, knobs, key) to (states, moments, loss).

    Everything that differs between blocks of one shape is an argument.
    """

    def loss_of(weights: Tree, constants: Tree, batch: Tree, key: mx.array) -> mx.array:
        data = BlockData(**batch)
        block.module.update(constants["fixed"])
        block.set_weights(weights)
        grids = constants.get("grids", {})
        keys = mx.random.split(key, max(len(grids), 1))
        for place, (path, grid) in enumerate(grids.items()):
            hook = dropped_fake_quantize(ActivationGrid(*grid), data.step, keys[place])
            block.set_hooks({path: hook})
        errors = stream_errors(block(data), data.targets, constants["power"])
        block.clear_hooks()
        return weighted(constants["stream_weight"], errors)

    grad_of = mx.value_and_grad(loss_of)

    def step(
        constants: Tree, batch: Tree, states: Tree, moments: Tree, knobs: Tree, key: mx.array
    ) -> tuple[Tree, Tree, mx.array]:
        layers = {p: Layer(constants["scale"][p], constants["base"][p]) for p in states}
        soft, weights = {}, {}
        for path, lane in zip(states, cycle(lanes()), strict=False):
            with mx.stream(lane):
                soft[path] = rounding.steps(states[path], layers[path])
                weights[path] = soft[path][0] * wide(layers[path], soft[path][0])
        loss, grads = grad_of(weights, constants, batch, key)
        new_states, new_moments = {}, {}
        for (path, state), lane in zip(states.items(), cycle(lanes()), strict=False):
            with mx.stream(lane):
                layer, known = layers[path], soft[path][1]
                per_step = grads[path] * wide(layer, state)
                gradient = rounding.gradient(known, layer, per_step, knobs["reg"], knobs["power"])
                new_states[path], new_moments[path] = adam(state, gradient, moments[path], knobs)
        return new_states, new_moments, loss

    return step


def wide(layer: Layer, state: mx.array) -> mx.array:
    """The scales as they broadcast over the weight."""
    return layer.scale if layer.scale.shape[1] == 1 else spread(layer.scale, state.shape[1])


def adam(
    state: mx.array, gradient: mx.array, moments: tuple[mx.array, mx.array], knobs: Tree
) -> tuple[mx.array, tuple[mx.array, mx.array]]:
    """One step of Adam; `rate` holds the correction of both moments."""
    first = BETA_1 * moments[0] + (1 - BETA_1) * gradient
    second = BETA_2 * moments[1] + (1 - BETA_2) * mx.square(gradient)
    return state - knobs["rate"] * first / (mx.sqrt(second) + EPSILON), (first, second)


def undecided(rounding: Rounding, layers: dict[str, Layer], states: Tree) -> float:
    """Share of weights whose soft value is further than 0.1 from a whole number."""
    far, total = 0.0, 0
    for path, state in states.items():
        value, _ = rounding.steps(state, layers[path])
        far += mx.sum(mx.abs(value - mx.round(value)) > 0.1).item()
        total += state.size
    return far / total

"""Tunes the codes, scales and biases of many linears at once, for a loss over the whole network.

Rounding a block against its own output leaves two things undone: it does not know which of its
errors the network magnifies, and errors of different blocks never learn to cancel. Here one loss,
over what the whole network gives, moves them all. Codes learn as in `rounding.StraightThrough`,
scales by their logarithm, biases in the unit of an output's rounding error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from .grid import code_range, spread
from .learning import BETA_1, BETA_2, adam
from .rounding import start_between

Tree = dict[str, Any]
Loss = Callable[[Tree, Tree, Tree], mx.array]  # of weights, biases and a batch


@dataclass(frozen=True)
class Rates:
    """Of Adam at the start; all fall to 0 along a line."""

    codes: float = 5e-3  # in steps of the grid
    scales: float = 1e-3  # of their logarithm
    biases: float = 1e-3  # in steps of the grid times the root of the input channels

    def at(self, done: float, iteration: int, warm: float = 1.0) -> Tree:
        """When `done` (0 to 1) of the run is over, with the correction of Adam's moments."""
        falling = warm * (1 - done)
        falling *= (1 - BETA_2 ** (iteration + 1)) ** 0.5 / (1 - BETA_1 ** (iteration + 1))
        return {
            "steps": {"rate": mx.array(self.codes * falling)},
            "log_ratio": {"rate": mx.array(self.scales * falling)},
            "bias_steps": {"rate": mx.array(self.biases * falling)},
        }


@dataclass(frozen=True)
class Tuned:
    """What is known of a linear while it is tuned: where it began."""

    scale: mx.array  # (rows, groups)
    bias: mx.array  # (rows,) zeros where the linear has none
    bits: int

    def state(self, weight: mx.array, codes: mx.array) -> Tree:
        """The state that stands for these codes and this layer's own scales and bias."""
        return {
            "steps": start_between(weight, self.scale, codes),
            "log_ratio": mx.zeros_like(self.scale),
            "bias_steps": mx.zeros_like(self.bias),
        }

    def codes(self, state: Tree) -> mx.array:
        """float32 whole numbers."""
        return mx.round(mx.clip(state["steps"], *code_range(self.bits)))

    def scales(self, state: Tree) -> mx.array:
        return self.scale * mx.exp(state["log_ratio"])

    def bias_unit(self, columns: int) -> mx.array:
        return self.scale.mean(axis=1) * columns**0.5

    def weight_and_bias(self, state: Tree) -> tuple[mx.array, mx.array]:
        """As they enter the loss."""
        codes = self.codes(state)
        weight = codes * spread(self.scales(state), codes.shape[1])
        return weight, self.bias + state["bias_steps"] * self.bias_unit(codes.shape[1])

    def gradient(self, state: Tree, of_weight: mx.array, of_bias: mx.array) -> Tree:
        """The state's, from those of weight and bias; that of the codes passes straight through."""
        rows, columns = of_weight.shape
        per_step = of_weight * spread(self.scales(state), columns)
        along = (per_step * self.codes(state)).reshape(rows, self.scale.shape[1], -1)
        return {
            "steps": per_step,
            "log_ratio": along.sum(axis=-1),
            "bias_steps": of_bias * self.bias_unit(columns),
        }


Layers = Mapping[str, Tuned]


def weights_and_biases(layers: Layers, states: Tree) -> tuple[Tree, Tree]:
    both = {path: layer.weight_and_bias(states[path]) for path, layer in layers.items()}
    return {p: w for p, (w, _) in both.items()}, {p: b for p, (_, b) in both.items()}


@dataclass
class Refiner:
    """Two functions of an iteration, compiled where that is faster: what may be averaged over
    processes lies between them."""

    layers: Layers
    loss: Loss
    compiled: bool = False
    average: Callable[[Tree], Tree] = field(default=lambda gradients: gradients)

    def __post_init__(self) -> None:
        wrap = mx.compile if self.compiled else (lambda function: function)
        self._gradients, self._update = wrap(self.gradients), wrap(self.update)

    def gradients(self, states: Tree, batch: Tree) -> tuple[mx.array, Tree]:
        """Loss, and the gradients of weights and biases."""
        weights, biases = weights_and_biases(self.layers, states)
        loss, (of_weights, of_biases) = mx.value_and_grad(self.loss, argnums=(0, 1))(
            weights, biases, batch
        )
        return loss, {"weights": of_weights, "biases": of_biases}

    def update(self, states: Tree, moments: Tree, gradients: Tree, rates: Tree) -> tuple:
        """One step of Adam."""
        new_states, new_moments = {}, {}
        for path, layer in self.layers.items():
            own = layer.gradient(
                states[path], gradients["weights"][path], gradients["biases"][path]
            )
            stepped = {
                kind: adam(states[path][kind], own[kind], moments[path][kind], rates[kind])
                for kind in own
            }
            new_states[path] = {kind: state for kind, (state, _) in stepped.items()}
            new_moments[path] = {kind: moment for kind, (_, moment) in stepped.items()}
        return new_states, new_moments

    def step(self, states: Tree, moments: Tree, batch: Tree, rates: Tree) -> tuple:
        """(states, moments, loss) after one iteration."""
        loss, gradients = self._gradients(states, batch)
        gradients = self.average(gradients)
        states, moments = self._update(states, moments, gradients, rates)
        mx.async_eval(states, moments, loss)
        return states, moments, loss


def zero_moments(states: Tree) -> Tree:
    return {
        path: {kind: (mx.zeros_like(s), mx.zeros_like(s)) for kind, s in state.items()}
        for path, state in states.items()
    }

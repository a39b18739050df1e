"""Two ways to make rounding learnable, by hand-written gradients.

Both begin between the given codes and the weight itself: at code + share·(W/s − code), so close to
the code that rounding gives it back. The state of a layer is one float32 array of the weight's
shape; the gradient of the loss with respect to the dequantized weight is all that they are told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import mlx.core as mx

from .grid import code_range, spread

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # γ and ζ of the rectified sigmoid
NEAREST_EDGE = 0.49  # how far from its code a value may start, in steps


def start_between(
    weight: mx.array, scale: mx.array, codes: mx.array, share: float = 0.5
) -> mx.array:
    """From the codes some share of the way to the weight, in steps, still rounding to the codes."""
    codes = codes.astype(mx.float32)
    ratio = weight / spread(scale, weight.shape[1])
    return codes + mx.clip(share * (ratio - codes), -NEAREST_EDGE, NEAREST_EDGE)


@dataclass(frozen=True)
class Layer:
    """What does not change while one layer's rounding is learned."""

    scale: mx.array  # (rows, groups)
    base: mx.array  # float32, the lower of the two codes between which a sigmoid decides


class Rounding(Protocol):
    """How a layer's state becomes weights, and how it learns."""

    rate_falls: ClassVar[bool]  # whether Adam's rate falls to 0 over the run

    def base(self, start: mx.array) -> mx.array:
        """What `Layer.base` is for a start in steps."""

    def state(self, start: mx.array, layer: Layer) -> mx.array:
        """The state whose weights are `start` in steps."""

    def steps(self, state: mx.array, layer: Layer) -> tuple[mx.array, mx.array | None]:
        """The weights in steps as they enter the loss, and what `gradient` wants to know again."""

    def codes(self, state: mx.array, layer: Layer) -> mx.array:
        """The codes, float32 whole numbers."""

    def gradient(
        self,
        known: mx.array | None,
        layer: Layer,
        per_step: mx.array,
        reg: mx.array,
        power: mx.array,
    ) -> mx.array:
        """The state's gradient: of the loss, given per step of the grid, and of the regulariser.

        `reg` is the regulariser's weight, `power` its exponent.
        """


@dataclass(frozen=True)
class StraightThrough:
    """The state is the weight in steps; the loss sees it rounded, the gradient does not."""

    rate_falls: ClassVar[bool] = True

    bits: int

    def base(self, start: mx.array) -> mx.array:
        return mx.zeros((1,))

    def state(self, start: mx.array, layer: Layer) -> mx.array:
        return start

    def steps(self, state: mx.array, layer: Layer) -> tuple[mx.array, None]:
        return self.codes(state, layer), None

    def codes(self, state: mx.array, layer: Layer) -> mx.array:
        return mx.round(mx.clip(state, *code_range(self.bits)))

    def gradient(
        self, known: None, layer: Layer, per_step: mx.array, reg: mx.array, power: mx.array
    ) -> mx.array:
        return per_step


@dataclass(frozen=True)
class RectifiedSigmoid:
    """AdaRound (Nagel et al., arXiv:2004.10568): W = s·clip(base + h(α)), h = clip(σ(α)·1.2 − 0.1).

    The state is α. The regulariser 1 − |2h − 1|^b drives every h to 0 or 1, at the very end of the
    run most of all: a rate that falls to 0 would leave it no time.
    """

    rate_falls: ClassVar[bool] = False

    bits: int

    def base(self, start: mx.array) -> mx.array:
        return mx.floor(start)

    def state(self, start: mx.array, layer: Layer) -> mx.array:
        share = (start - layer.base - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)
        return mx.log(share / (1 - share))

    def steps(self, state: mx.array, layer: Layer) -> tuple[mx.array, mx.array]:
        sigmoid = logistic(state)
        return mx.clip(layer.base + rectified(sigmoid), *code_range(self.bits)), sigmoid

    def codes(self, state: mx.array, layer: Layer) -> mx.array:
        up = (state >= 0).astype(mx.float32)
        return mx.clip(layer.base + up, *code_range(self.bits))

    def gradient(
        self, known: mx.array, layer: Layer, per_step: mx.array, reg: mx.array, power: mx.array
    ) -> mx.array:
        low, high = code_range(self.bits)
        stretched = known * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW
        # One mask, as a factor: on a CPU `where` takes several times as long. Where base is at the
        # grid's end both ends of α give the same code, so nothing is lost without the penalty.
        free = (stretched > 0) & (stretched < 1) & (layer.base >= low) & (layer.base < high)
        slope = (STRETCH_HIGH - STRETCH_LOW) * known * (1 - known) * free
        signed = 2 * stretched - 1
        penalty = mx.sign(signed) * mx.power(mx.abs(signed), power - 1)
        return slope * (per_step - (2 * reg * power) * penalty)


def logistic(x: mx.array) -> mx.array:
    """The sigmoid. MLX's own takes three times as long on a CPU, where `power` beats `exp`."""
    return 1 / (1 + mx.power(mx.array(math.e, dtype=x.dtype), -x))


def rectified(sigmoid: mx.array) -> mx.array:
    """h: how much of the step up is taken, 0 to 1."""
    return mx.clip(sigmoid * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW, 0, 1)


def regulariser(alpha: mx.array, power: float) -> mx.array:
    """Mean of 1 − |2h(α) − 1|^power: 0 where every weight has decided, 1 where none has."""
    return mx.mean(1 - mx.power(mx.abs(2 * rectified(logistic(alpha)) - 1), power))


def annealed_power(done: float, warmup: float, high: float, low: float) -> float:
    """The regulariser's exponent when `done` (0 to 1) of the run is over; falls along a cosine."""
    part = min(max((done - warmup) / max(1 - warmup, 1e-9), 0.0), 1.0)
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * part))

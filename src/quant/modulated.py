"""MoDiff: layers that quantize the change of their input from step to step, not the input.

The first step of a picture tells the input, at 8 bits: â = Q(a), ô = W·â + b. Each later one tells
how it has moved: r = Q(a − â), then â += r and ô += W·r. What one step rounds away is part of the
next one's change, so errors do not add up; changes are small, and so are their scales.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..backends import Device
from ..errors import UserError
from .affine import Affine, ByteAffine, FloatAffine, QuantizedAffine
from .int8 import INT8Linear
from .linear import QuantizedLinear
from .residual_scales import Dynamic, Quantizer, as_differences, from_differences, in_pairs
from .schedule import SAME_SIGMA

Velocity = Callable[[mx.array, mx.array], mx.array]
LARGEST_HALF = 2048  # up to which float16 holds every whole number
RESET = "call reset_cache() before each picture or batch, as Pipeline.velocity does"


class Memory:
    """What modulated layers keep from step to step: â and ô of each, apart from all parameters.

    Before a picture's first step both are empty, afterwards they have the shape of the input and of
    the output. So shapes say which step it is, and a compiled step has two traces: the first one's,
    and that of all others. `arrays` are to be the compiled function's inputs and outputs.
    """

    def __init__(self) -> None:
        self.arrays: dict[str, list[mx.array]] = {}
        self.guided = False  # whether a batch is prompts and, behind them, their negatives
        self._picture = 0  # how often it was reset; 0: never
        self._sigma: float | None = None
        self._sigmas: list[float] | None = None

    def add(self, key: str) -> None:
        """Makes room for a layer."""
        if key in self.arrays:
            raise ValueError(f"two layers are called {key!r}")
        self.arrays[key] = [nothing(), nothing()]

    def only_at(self, sigmas: list[float]) -> None:
        """Steps at other noise levels are refused from now on: scales were measured for these."""
        self._sigmas = sigmas

    def reset(self, guided: bool = False) -> None:
        """Forgets the picture: the next step is the first of another one, with guidance or not."""
        for kept in self.arrays.values():
            kept[:] = nothing(), nothing()
        self._picture, self._sigma, self.guided = self._picture + 1, None, guided

    def recall(self, key: str, shape: tuple[int, ...]) -> list[mx.array]:
        """A layer's â and ô, empty at the first step; an input of another shape is an error."""
        if not self._picture:
            raise UserError(f"the modulation was never reset; {RESET}")
        kept = self.arrays[key]
        if kept[0].size and kept[0].shape != shape:
            raise UserError(
                f"{key or 'a modulated layer'} remembers an input of shape {kept[0].shape}, this "
                f"one has {shape}: another batch size or resolution is another picture; {RESET}"
            )
        return kept

    @property
    def nbytes(self) -> int:
        """What it holds now."""
        return sum(array.nbytes for kept in self.arrays.values() for array in kept)

    def watched(self, velocity: Velocity) -> Velocity:
        """The same velocity, for the picture that was begun last: steps that are not its next ones
        are an error."""
        picture = self._picture

        def watched(latent: mx.array, sigma: mx.array) -> mx.array:
            self.advance(picture, float(mx.max(sigma)))
            found = velocity(latent, sigma)
            # â is no part of what was found: left to be computed, it would hold the change's codes
            # and the â before it.
            mx.eval(found, self.arrays)
            return found

        return watched

    def advance(self, picture: int, sigma: float) -> None:
        if picture != self._picture:
            raise UserError(
                f"another picture was begun before this one was finished; {RESET}, and draw one "
                "after the other"
            )
        if self._sigma is not None and sigma > self._sigma * (1 + SAME_SIGMA):
            raise UserError(
                f"the noise level rose from {self._sigma:.4g} to {sigma:.4g}, so this is another "
                f"picture; {RESET}"
            )
        if self._sigmas is not None:
            self.check_order(self._sigmas, sigma)
        self._sigma = sigma

    def check_order(self, sigmas: list[float], sigma: float) -> None:
        """Raises unless it is the first of the steps that scales were measured at, or the next one:
        they are those of changes from each to the next."""
        place = place_of(sigmas, sigma)
        if place is None:
            raise UserError(
                f"sigma {sigma:.4g} is none of the {len(sigmas)} that the scales of the "
                "modulation were measured at; measure them for this number of steps, or take "
                "dynamic ones"
            )
        last = None if self._sigma is None else place_of(sigmas, self._sigma)
        if place not in ((0,) if last is None else (last, last + 1)):
            raise UserError(
                f"sigma {sigma:.4g} is step {place} of the modulation's scales, and the "
                f"picture's step before was {'none' if last is None else last}; begin with the "
                "first and leave none out, or take dynamic scales"
            )


def place_of(sigmas: list[float], sigma: float) -> int | None:
    """Which of them it is."""
    places = (i for i, known in enumerate(sigmas) if abs(known - sigma) <= SAME_SIGMA * known)
    return next(places, None)


def nothing() -> mx.array:
    return mx.zeros((0,))


class Modulated(nn.Module):
    """A layer around another one, whose input it quantizes: as it is, or as it has changed.

    With `activations` off the input stays in floats; with `modulate` off it is quantized as it is,
    by `values`. Rows of a batch are told apart, so guidance's two halves have memories of their
    own. The output of a layer with a bias that changes over the steps is ô + b_t; otherwise ô
    holds the bias.
    """

    is_token_by_token = True  # whether an output's token is made of the input's same token alone

    def __init__(
        self,
        layer: nn.Module,
        residuals: Quantizer | None,
        *,
        values: Quantizer | None = None,
        memory: Memory | None = None,
        key: str = "",
        exact: nn.Module | None = None,
    ) -> None:
        """Without `residuals` it never modulates, without `values` it is never without.

        `exact` is the layer in 16 bits, for comparisons; the memory is the layer's own unless it is
        shared with others.
        """
        super().__init__()
        self.layer = layer
        self._residuals, self._values, self._key = residuals, values, key
        self._memory = Memory() if memory is None else memory
        if residuals is not None:
            self._memory.add(key)
        self._quantized = affine(layer)
        self._exact = None if exact is None else FloatAffine(exact, frame_of(layer))
        self.switch()

    def switch(
        self, *, weights: bool = True, activations: bool = True, modulate: bool = True
    ) -> None:
        """What is quantized from now on: the weights, the input, or only the input's change."""
        self.check_switch(weights=weights, activations=activations, modulate=modulate)
        if not weights:
            mx.eval(self._exact.layer.parameters())  # no child, so nobody else computes them
        self._parts: Affine = self._quantized if weights else self._exact
        self._modulates = self.would_modulate(activations, modulate)
        quantizer = self._residuals if self._modulates else self._values if activations else None
        self._quantizer = quantizer
        self._parts.expect(None if quantizer is None else quantizer.largest)
        self._sums = self._parts.sums() if needs_sums(quantizer) else None

    def check_switch(self, *, weights: bool, activations: bool, modulate: bool) -> None:
        """Raises for what `switch` cannot be told; nothing is changed."""
        if not weights and self._exact is None:
            raise UserError(
                f"{self._key or 'a modulated layer'} has no 16-bit weights to go back to; make it "
                "with them"
            )
        modulates = self.would_modulate(activations, modulate)
        if activations and not modulates and self._values is None:
            raise UserError(
                f"{self._key or 'a modulated layer'} has no scales for its input as it is; "
                "take dynamic ones, give a quant config, or make it with values="
            )

    def would_modulate(self, activations: bool, modulate: bool) -> bool:
        return activations and modulate and self._residuals is not None

    @property
    def modulates(self) -> bool:
        """Whether it quantizes changes, at present."""
        return self._modulates

    def reset_cache(self, guided: bool = False) -> None:
        """Begins another picture; layers that share the memory begin it too. `guided`: its batch is
        the prompts' rows and, behind them, the negative prompts'."""
        self._memory.reset(guided)

    def __call__(self, x: mx.array) -> mx.array:
        """As the layer itself, in the dtype of x."""
        # Compiled, what makes x and its codes would be one kernel, which is too long to be fast.
        parts, entered = self._parts, self._parts.entered(mx.contiguous(x))
        if self._modulates:
            y = self.remembered(entered)
        else:
            y = added(self.moved(entered, self._quantizer, False)[1], parts.bias(x.ndim))
        return added(y, parts.beside(entered, x.dtype)).astype(x.dtype)

    def remembered(self, entered: mx.array) -> mx.array:
        """W·â + b, after â has come as near to what entered as the grid of the change allows."""
        kept = self._memory.recall(self._key, entered.shape)
        first, bias = kept[0].size == 0, self._parts.bias(entered.ndim)
        if first:
            told, output = self.moved(entered, self._quantizer, True)
            output = added(output, bias if self._parts.steady else None)
        else:
            change, moved = self.moved(entered - kept[0], self._quantizer, False)
            told, output = kept[0] + change, kept[1] + moved
        kept[:] = told, output
        return output if self._parts.steady else added(output, bias)

    def moved(
        self, x: mx.array, quantizer: Quantizer | None, first: bool
    ) -> tuple[mx.array, mx.array]:
        """x on its grid, and the product of just that."""
        if quantizer is None:
            return x, self._parts.product(x, None)
        if not (self.is_token_by_token and self._memory.guided and in_pairs(quantizer)):
            return self.on_grid(x, quantizer, first)
        x, smaller = as_differences(x)
        return tuple(from_differences(y, smaller) for y in self.on_grid(x, quantizer, first))

    def on_grid(self, x: mx.array, quantizer: Quantizer, first: bool) -> tuple[mx.array, mx.array]:
        """The same of an input whose rows have nothing to do with each other."""
        told = quantizer(x, first)
        about_middle = told.middle is not None
        if quantizer.largest is None or (about_middle and self._sums is None):
            return told.values, self._parts.product(told.values, None)
        told = told._replace(codes=told.codes.astype(codes_dtype(quantizer.largest)))
        moved = self._parts.product(told.codes, told.factor)
        return told.values, added(moved, told.middle * self._sums if about_middle else None)

    def _extra_repr(self) -> str:
        shown = self._quantizer if isinstance(self._quantizer, Dynamic) else "scales of each step"
        return f"modulate={self._modulates}, {shown if self._quantizer else 'input in floats'}"


class ModulatedLinear(Modulated):
    """Around a linear, quantized or not: input (…, tokens, channels), the first axis pictures."""


class ModulatedConv2d(Modulated):
    """Around a convolution: input (pictures, height, width, channels); a token is a pixel."""

    is_token_by_token = False


def modulated(layer: nn.Module, residuals: Quantizer | None, **settings: object) -> Modulated:
    """The wrapper that suits the layer."""
    kind = ModulatedConv2d if isinstance(layer, nn.Conv2d) else ModulatedLinear
    return kind(layer, residuals, **settings)


def affine(layer: nn.Module) -> Affine:
    if isinstance(layer, QuantizedLinear):
        return QuantizedAffine(layer)
    return ByteAffine(layer) if isinstance(layer, INT8Linear) else FloatAffine(layer)


def codes_dtype(largest: int) -> mx.Dtype:
    """What holds whole numbers up to the largest in the fewest bytes that products are fast in."""
    on_cpu = Device.here().kind == "cpu"
    return mx.float32 if on_cpu or largest > LARGEST_HALF else mx.float16


def needs_sums(quantizer: Quantizer | None) -> bool:
    return isinstance(quantizer, Dynamic) and quantizer.about_middle


def frame_of(layer: nn.Module) -> QuantizedLinear | None:
    """Whose shift and smoothing apply where 16-bit weights stand in for the layer's."""
    return layer if isinstance(layer, QuantizedLinear) else None


def added(y: mx.array, more: mx.array | None) -> mx.array:
    return y if more is None else y + more


def set_quant_state(
    model: nn.Module, *, weights: bool = True, activations: bool = True, modulate: bool = True
) -> int:
    """Switches each of the three on or off in all of the model's modulated layers; how many there
    are. What they remember is of the other state, so the next step must be a picture's first.

    Layers that were not chosen for modulation quantize their input as it is. Without `activations`
    there is nothing to modulate.
    """
    layers = [m for _, m in model.named_modules() if isinstance(m, Modulated)]
    if not layers:
        raise UserError("the model has no modulated layer to switch; give --modulate first")
    for layer in layers:  # all of them before the first is changed
        layer.check_switch(weights=weights, activations=activations, modulate=modulate)
    for layer in layers:
        layer.switch(weights=weights, activations=activations, modulate=modulate)
    for memory in {id(layer._memory): layer._memory for layer in layers}.values():
        memory.reset()
    return len(layers)

"""Modules whose linears share work where one backend does it for them; elsewhere each runs alone.

They stand where the model's own stand and have the same children, so paths stay what they are. What
a child is, is looked up at every call: other layers may take its place at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..backends.fusing import Modulation
from .fused import Fused, Merged, modulate_alike, read_alike

Projected = mx.array | tuple[mx.array, mx.array, mx.array]


@dataclass(frozen=True)
class Norm:
    """The model's modulated layer norm: a function of x, shift and scale, and its epsilon."""

    modulate: Callable[[mx.array, mx.array, mx.array], mx.array]
    eps: float


class JoinedProjections(nn.Module):
    """An attention's linears; where q, k and v read their input alike it is quantized once, if the
    backend can together with the layer norm, and if it can they are one product. o_proj ends with
    the residual where it can."""

    def __init__(self, attention: nn.Module, norm: Norm) -> None:
        super().__init__()
        for name, child in attention.children().items():
            if isinstance(child, nn.Module):
                self[name] = child
        self._norm = norm
        self._merged = Merged.of((self.q_proj, self.k_proj, self.v_proj))
        if self._merged is not None:
            self._operand = self._merged.operand  # a compiled function has to find its arrays here

    def project(self, x: mx.array) -> Projected:
        """q, k and v, heads side by side; as one array where they are one product."""
        layers = self.q_proj, self.k_proj, self.v_proj
        if not x.size or not read_alike(layers):
            return tuple(layer(x) for layer in layers)
        return self.of_codes(layers, x, self.q_proj.codes(x))

    def project_modulated(self, x: mx.array, shift: mx.array, scale: mx.array) -> Projected:
        """The same of tokens before their modulation."""
        layers = self.q_proj, self.k_proj, self.v_proj
        modulation = Modulation(scale, shift, self._norm.eps)
        if not modulate_alike(layers, x, modulation):
            return self.project(self._norm.modulate(x, shift, scale))
        return self.of_codes(layers, x, self.q_proj.codes_of_modulated(x, modulation))

    def of_codes(self, layers: Sequence[nn.Module], x: mx.array, codes: Any) -> Projected:
        """The outputs for x, whose codes are known."""
        merged = self._merged
        if merged is not None and merged.holds(layers) and not merged.mixes_biases():
            return merged.of_codes(x, codes)
        return tuple(layer.of_codes(x, codes) for layer in layers)

    def add_output(self, x: mx.array, attended: mx.array, gate: mx.array) -> mx.array:
        """x with the gated output projection added."""
        return gated_sum(self.o_proj, x, attended, gate)


class JoinedFeedForward(nn.Module):
    """fc2 of GELU (its tanh form) of fc1; where it can, fc1 begins with the layer norm and ends
    with GELU and fc2's codes, and fc2 with the residual."""

    def __init__(
        self,
        fc1: nn.Module,
        fc2: nn.Module,
        activation: Callable[[mx.array], mx.array],
        norm: Norm,
    ) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2
        self._activation, self._norm = activation, norm

    def __call__(self, x: mx.array) -> mx.array:
        fc1, fc2 = self.fc1, self.fc2
        if x.size and isinstance(fc1, Fused) and fc1.leads_to(fc2):
            return fc2.of_codes(x, fc1.codes_behind(fc1.codes(x), fc2))
        return fc2(self._activation(fc1(x)))

    def add_modulated(
        self, x: mx.array, shift: mx.array, scale: mx.array, gate: mx.array
    ) -> mx.array:
        """x with the gated output for modulated x added."""
        fc1, fc2, modulation = self.fc1, self.fc2, Modulation(scale, shift, self._norm.eps)
        if not modulate_alike([fc1], x, modulation):
            return x + self(self._norm.modulate(x, shift, scale)) * gate[:, None]
        codes = fc1.codes_of_modulated(x, modulation)
        if fc1.leads_to(fc2):
            return fc2.added(x, fc1.codes_behind(codes, fc2), gate)
        return gated_sum(fc2, x, self._activation(fc1.of_codes(x, codes)), gate)


def gated_sum(layer: nn.Module, x: mx.array, inputs: mx.array, gate: mx.array) -> mx.array:
    """x + gate · the layer's output for these inputs, a gate for each entry of the batch."""
    if isinstance(layer, Fused) and layer.adds_to(x, gate) and inputs.dtype == x.dtype:
        return layer.added(x, layer.codes(inputs), gate)
    return x + layer(inputs) * gate[:, None]

"""Modules whose linears share work where one backend does it for them; elsewhere each runs alone.

They stand where the model's own stand and have the same children, so paths stay what they are. What
a child is, is looked up at every call: other layers may take its place at any time.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .fused import Fused, read_alike


class JoinedProjections(nn.Module):
    """An attention's linears; where q, k and v read their input alike it is quantized once."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        for name, child in attention.children().items():
            self[name] = child

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """q, k and v, heads side by side."""
        layers = self.q_proj, self.k_proj, self.v_proj
        if not x.size or not read_alike(layers):
            return tuple(layer(x) for layer in layers)
        codes = self.q_proj.codes(x)
        return tuple(layer.of_codes(x, codes) for layer in layers)


class JoinedFeedForward(nn.Module):
    """fc2 of GELU (its tanh form) of fc1; where it can, fc1 ends with GELU and fc2's codes."""

    def __init__(
        self, fc1: nn.Module, fc2: nn.Module, activation: Callable[[mx.array], mx.array]
    ) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2
        self._activation = activation

    def __call__(self, x: mx.array) -> mx.array:
        fc1, fc2 = self.fc1, self.fc2
        if x.size and isinstance(fc1, Fused) and fc1.leads_to(fc2):
            return fc2.of_codes(x, fc1.codes_behind(x, fc2))
        return fc2(self._activation(fc1(x)))

"""The part of a quantized linear that its backend does by itself: codes, bias and cast.

A backend that fuses (backends/fusing.py) is given the grid instead of codes, and ends its product
with the bias of the step; one that chains ends it with GELU and the next layer's codes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..backends.fusing import Chaining, Fusing, InputGrid


class Fused:
    """What QuantizedLinear is beside a module; its parameters and private attributes are read."""

    def prepare_fusion(self) -> None:
        """To be called when the operand is there: finds out whether it fuses, and makes tables."""
        self._fuses = (
            self._quantizes
            and self._coarse[0] == 1
            and isinstance(self._backend, Fusing)
            and self._backend.fuses(self._operand)
        )
        self._tables = self.tables() if self._fuses else {}
        self._input_key = self.input_key() if self._fuses else ""

    @property
    def fuses(self) -> bool:
        """Whether the backend quantizes the input and adds the bias: `codes` and `of_codes`."""
        return self._fuses

    def tables(self) -> dict[str, mx.array]:
        """What the backend reads of the biases, and of the input where it lies behind a layer."""
        found: dict[str, mx.array] = {}
        if "bias" in self:
            found["bias"] = self._backend.bias_table(self._operand, self.bias)
        if isinstance(self._backend, Chaining) and not self._per_token:
            given = self.get("shift"), self.get("smoothing")
            found["input"] = self._backend.input_table(*given, self.packed.columns)
        mx.eval(found)
        return found

    def input_key(self) -> str:
        """The same for layers to which the same input is the same codes."""
        read = (self.get(name) for name in ("a_scale", "a_bits", "shift", "smoothing"))
        parts = [b"" if array is None else np.array(array).tobytes() for array in read]
        which = f"{self._backend.name} {id(self._step)} {self._per_token} {[*map(len, parts)]}"
        return hashlib.sha256(which.encode() + b"".join(parts)).hexdigest()

    def codes(self, x: mx.array) -> Any:
        """x̂ as the backend has it, also for other layers that `read_alike`."""
        scale, limit = self._step.grid(self._number, x.ndim)
        shift = self._step.vector(self.shift, x.ndim) if "shift" in self else None
        smoothing, per_token = self.get("smoothing"), self._per_token
        grid = InputGrid(scale.reshape(-1), limit.reshape(-1), shift, smoothing, per_token)
        return self._backend.quantize(x, grid)

    def of_codes(self, x: mx.array, codes: Any) -> mx.array:
        """The output for x, whose codes are known. Without a low-rank branch nothing but the
        tokens' shape and the dtype of x counts."""
        more, mixed = "low_rank_up" in self, self.mixes_biases()
        dtype = mx.float32 if more or mixed else x.dtype
        y = self._backend.product(codes, self._operand, dtype, self.bias_row())
        y = y.reshape(*x.shape[:-1], len(self.weight))
        if more:
            y = y + self.low_rank(self.centred(x), x.dtype)
        if mixed:
            y = y + self.bias_here(x.ndim)
        return y.astype(x.dtype)

    def mixes_biases(self) -> bool:
        """Whether the batch's rows may be at different steps, with biases of their own."""
        return "bias" in self and len(self.bias) > 1 and self._step.place.size > 1

    def bias_row(self) -> mx.array | None:
        """Of the bias table, for a product; none where there is no bias or rows have their own."""
        if "bias" not in self or self.mixes_biases():
            return None
        return self._step.vector(self._tables["bias"], 2).reshape(-1)

    def leads_to(self, other: nn.Module) -> bool:
        """Whether the product can end with GELU and the other layer's codes: `codes_behind`."""
        return (
            isinstance(other, Fused)
            and self._fuses
            and other._fuses
            and self._backend is other._backend
            and "input" in other._tables
            and other._step.place.size == 1
            and not self.mixes_biases()
            and not any("low_rank_up" in layer for layer in (self, other))
        )

    def codes_behind(self, x: mx.array, other: Fused) -> Any:
        """The other layer's codes of GELU (its tanh form) of this layer's output for x."""
        row = other._step.vector(other._tables["input"], 2).reshape(-1)
        following = self._backend.following(row, *other._step.grid(other._number, 1))
        return self._backend.product_gelu(self.codes(x), self._operand, following, self.bias_row())


def read_alike(layers: Sequence[nn.Module]) -> bool:
    """Whether the first one's `codes` of an input are those of all the layers."""
    fused = [layer for layer in layers if isinstance(layer, Fused) and layer.fuses]
    return len(fused) == len(layers) and len({layer._input_key for layer in fused}) == 1

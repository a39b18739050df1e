"""The part of a quantized linear that its backend does by itself: codes, bias and cast.

A backend that fuses (backends/fusing.py) is given the grid instead of codes, and ends its product
with the bias of the step; one that chains ends it with GELU and the next layer's codes, one that
adds with a gate and the residual; one that normalizes begins with the modulated layer norm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..backends.fusing import (
    Adding,
    Chaining,
    Fusing,
    InputGrid,
    Merging,
    Modulation,
    Normalizing,
    is_per_entry,
)
from ..errors import UserError
from .grid import check_floats
from .schedule import Step


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
        self._normalizes = self._fuses and isinstance(self._backend, Normalizing)
        self._adds = self._fuses and isinstance(self._backend, Adding)
        self._tables = self.tables() if self._fuses else {}
        self._input_key = self.input_key() if self.shares else ""

    @property
    def fuses(self) -> bool:
        """Whether the backend quantizes the input and adds the bias."""
        return self._fuses

    @property
    def shares(self) -> bool:
        """Whether there are codes that other layers may read: all that is quantized has them."""
        return self._quantizes

    def tables(self) -> dict[str, mx.array]:
        """What the backend reads of the biases, and of the input where it lies behind a layer: a
        row a step, or the one row that there is."""
        found: dict[str, mx.array] = {}
        if "bias" in self:
            found["bias"] = flat(self._backend.bias_table(self._operand, self.bias))
        if isinstance(self._backend, Chaining) and not self._per_token:
            given = self.get("shift"), self.get("smoothing")
            found["input"] = flat(self._backend.input_table(*given, self.packed.columns))
        mx.eval(found)
        return found

    def input_key(self) -> str:
        """The same for layers to which the same input is the same codes."""
        read = (self.get(name) for name in ("a_scale", "a_bits", "shift", "smoothing"))
        parts = [b"" if array is None else np.array(array).tobytes() for array in read]
        by = self._backend.name if self._fuses else f"no backend, {self._coarse}"
        which = f"{by} {id(self._step)} {self._per_token} {[*map(len, parts)]}"
        return hashlib.sha256(which.encode() + b"".join(parts)).hexdigest()

    def codes(self, x: mx.array) -> Any:
        """x̂ as the backend has it, also for other layers that `read_alike`."""
        self.check_input(x)
        if not self._fuses:
            return self.plain_codes(x)
        return self._backend.quantize(x, self.input_grid(x.ndim))

    def input_grid(self, ndim: int) -> InputGrid:
        """Of here, for an input of that many dimensions."""
        grid = self._step.grid(self._number, 1)
        shift = self.get("shift")
        if shift is not None and len(shift) > 1:
            shift = self._step.vector(shift, ndim)
        return InputGrid(*grid, shift, self.get("smoothing"), self._per_token)

    def normalizes(self, x: mx.array, modulation: Modulation) -> bool:
        """Whether the backend makes codes of (batch, tokens, columns) that are not yet modulated;
        a low-rank branch wants them modulated."""
        return self._normalizes and "low_rank_up" not in self and modulation.fits(x)

    def codes_of_modulated(self, x: mx.array, modulation: Modulation) -> Any:
        """`codes` of what the modulation makes of x."""
        self.check_input(x)
        return self._backend.quantize_modulated(x, modulation, self.input_grid(x.ndim))

    def check_input(self, x: mx.array) -> None:
        """Raises for what is no float, and for other channels than the weight's, which most kernels
        would not notice."""
        check_floats(x)
        if x.shape[-1] != self.columns:
            raise UserError(f"an input of {x.shape[-1]} channels meets a weight of {self.columns}")

    def of_codes(self, x: mx.array, codes: Any) -> mx.array:
        """The output for x, whose codes are known. Without a low-rank branch nothing but the
        tokens' shape and the dtype of x counts."""
        if not self._fuses:
            return self.of_plain_codes(x, codes)
        more, mixed = "low_rank_up" in self, self.mixes_biases()
        dtype = mx.float32 if more or mixed else x.dtype
        y = self._backend.product(codes, self._operand, dtype, self.bias_row())
        y = y.reshape(*x.shape[:-1], len(self.weight))
        if more:
            y = y + self.low_rank(self.centred(x), x.dtype)
        if mixed:
            y = y + self.bias_here(x.ndim)
        return y.astype(x.dtype)

    def adds_to(self, x: mx.array, gate: mx.array) -> bool:
        """Whether the product can end with x + gate · output, both (batch, tokens, outputs)."""
        plain = "low_rank_up" not in self and not self.mixes_biases()
        return self._adds and plain and is_per_entry(gate, x)

    def added(self, x: mx.array, codes: Any, gate: mx.array) -> mx.array:
        """x + gate · the output for these codes, a gate for each entry of the batch."""
        if self.adds_to(x, gate):
            return self._backend.product_added(codes, self._operand, x, gate, self.bias_row())
        return x + self.of_codes(x, codes) * gate[:, None]

    def biases(self) -> mx.array:
        """The bias table, of zeros where there is no bias."""
        if "bias" in self:
            return mx.atleast_2d(self._tables["bias"])
        return self._backend.bias_table(self._operand, mx.zeros((1, len(self.weight))))

    def mixes_biases(self) -> bool:
        """Whether the batch's rows may be at different steps, with biases of their own."""
        return "bias" in self and len(self.bias) > 1 and self._step.place.size > 1

    def bias_row(self) -> mx.array | None:
        """Of the bias table, for a product; none where there is no bias or rows have their own."""
        if "bias" not in self or self.mixes_biases():
            return None
        return row_of(self._tables["bias"], self._step)

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

    def codes_behind(self, codes: Any, other: Fused) -> Any:
        """The other layer's codes of GELU (its tanh form) of this layer's output for its codes."""
        row = row_of(other._tables["input"], other._step)
        following = self._backend.following(row, *other._step.grid(other._number, 1))
        return self._backend.product_gelu(codes, self._operand, following, self.bias_row())


@dataclass(frozen=True)
class Merged:
    """Layers that read the same codes, as one product of all their outputs, side by side."""

    layers: Sequence[Fused]
    operands: Sequence[dict[str, Any]]  # theirs: another one is that of a layer prepared anew
    operand: dict[str, Any]  # of all, with the table of biases

    @classmethod
    def of(cls, layers: Sequence[nn.Module]) -> Merged | None:
        """None where their backend cannot, or one of them does more than a product."""
        if not read_alike(layers) or not all(layer.fuses for layer in layers):
            return None
        first, plain = layers[0], all("low_rank_up" not in layer for layer in layers)
        if not plain or not isinstance(first._backend, Merging):
            return None
        operands = [layer._operand for layer in layers]
        operand = first._backend.merged(operands)
        if operand is None:
            return None
        tables = [layer.biases() for layer in layers]
        steps = max(map(len, tables))
        spread = [mx.broadcast_to(table, (steps, table.shape[1])) for table in tables]
        operand["bias"] = flat(mx.contiguous(mx.concatenate(spread, axis=1)))
        mx.eval(operand["bias"])
        return cls(layers, operands, operand)

    def holds(self, layers: Sequence[nn.Module]) -> bool:
        """Whether these are the layers, and prepared as they were."""
        pairs = zip(layers, self.layers, self.operands, strict=True)
        return all(layer is own and own._operand is operand for layer, own, operand in pairs)

    def mixes_biases(self) -> bool:
        """Whether one of the layers does."""
        return any(layer.mixes_biases() for layer in self.layers)

    def of_codes(self, x: mx.array, codes: Any) -> mx.array:
        """(…, all outputs) for x, whose codes are known."""
        first = self.layers[0]
        row = row_of(self.operand["bias"], first._step)
        y = first._backend.product(codes, self.operand, x.dtype, row)
        return y.reshape(*x.shape[:-1], -1)


def flat(table: mx.array) -> mx.array:
    """A table of one step as its row: every operation on it would be one more at every call."""
    return table[0] if len(table) == 1 else table


def row_of(table: mx.array, step: Step) -> mx.array:
    """Of here, also between two steps."""
    return table if table.ndim == 1 else step.vector(table, 2).reshape(-1)


def read_alike(layers: Sequence[nn.Module]) -> bool:
    """Whether the first one's `codes` of an input are those of all the layers."""
    shared = [layer for layer in layers if isinstance(layer, Fused) and layer.shares]
    return len(shared) == len(layers) and len({layer._input_key for layer in shared}) == 1


def modulate_alike(layers: Sequence[nn.Module], x: mx.array, modulation: Modulation) -> bool:
    """Whether the first one's `codes_of_modulated` are the codes of all the layers."""
    return read_alike(layers) and all(layer.normalizes(x, modulation) for layer in layers)

"""The INT8 layer: a linear's weight held in bytes, its inputs quantized token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..backends import Backend
from ..backends.fusing import Adding, Fusing, InputGrid, Normalizing
from ..errors import UserError
from .fused import Fused
from .int8_operators import (
    AUTO,
    LIMIT,
    ByteWeight,
    INT8LinearFunction,
    INT8Quantizer,
    backend_for,
    check_backend,
    check_bias,
    checked_weight,
    quantized,
    token_grid,
)

PROTECTED = ("weight", "weight_scale")  # whose dtypes are part of their numbers
READ = (*PROTECTED, "bias")  # of which something may be prepared


@dataclass(frozen=True)
class Prepared:
    """What a backend that fuses keeps beside a layer's bytes."""

    backend: Backend
    held: dict[str, Any]  # its operand
    bias: mx.array | None  # a row of its bias table


class INT8Linear(Fused, nn.Module):
    """A linear whose weight is held as int8 and scales, one byte a weight, whatever multiplies."""

    def __init__(self, weight: mx.array, bias: mx.array | None = None, backend: str = AUTO) -> None:
        """Quantizes a float weight, one scale an output channel."""
        codes, scale = quantized(weight, 0, type(self).__name__)
        self._take(codes, scale, bias, backend)

    def _take(
        self, codes: mx.array, scale: mx.array, bias: mx.array | None, backend: str
    ) -> INT8Linear:
        super().__init__()
        check_backend(backend)
        checked_weight(codes, scale)
        check_bias(bias, len(codes))
        self._backend_name, self._is_shell = backend, False
        self.weight, self.weight_scale = codes, scale
        if bias is not None:
            self.bias = bias
        self.forget()
        return self.freeze()

    def forget(self) -> None:
        """Nothing is prepared: every call finds out for itself what multiplies."""
        self.prepared, self.expects = None, False

    def prepare_for(self, rows: int, dtype: mx.Dtype) -> None:
        """Expects inputs of so many rows: a backend that can takes over what is around the product,
        and codes are shared with other layers. Another weight ends it."""
        self.forget()
        if self._is_shell:
            return
        backend, dtype = backend_for(self._backend_name, rows, self.byte_weight, dtype)
        self.expects = True
        if not isinstance(backend, Fusing) or dtype == mx.float32:
            return
        operand = backend.prepare(self.byte_weight, dtype, LIMIT)
        if backend.fuses(operand):
            bias = None
            if "bias" in self:
                bias = backend.bias_table(operand, self.bias.astype(mx.float32)[None])[0]
            # The bytes are the layer's own, whichever they are at a call.
            held = {name: part for name, part in operand.items() if name != "bytes"}
            mx.eval(bias, [part for part in held.values() if isinstance(part, mx.array)])
            self.prepared = Prepared(backend, held, bias)

    @property
    def byte_weight(self) -> ByteWeight:
        """The codes and scales, as backends take them."""
        return ByteWeight(self.weight, self.weight_scale)

    @property
    def shares(self) -> bool:
        """Whether there are codes that other layers may read; unprepared, a layer that quantizes
        together with its product is faster alone."""
        return self.expects

    @property
    def _fuses(self) -> bool:
        return self.prepared is not None

    @property
    def _normalizes(self) -> bool:
        return self._fuses and isinstance(self._backend, Normalizing)

    @property
    def _adds(self) -> bool:
        return self._fuses and isinstance(self._backend, Adding)

    @property
    def _backend(self) -> Backend:
        return self.prepared.backend

    @property
    def _operand(self) -> dict[str, Any]:
        return {**self.prepared.held, "bytes": self.byte_weight}

    @property
    def _input_key(self) -> str:
        return f"int8 {self._backend.name if self._fuses else ''}"

    @property
    def columns(self) -> int:
        return self.weight.shape[1]

    def input_grid(self, ndim: int) -> InputGrid:
        """Scales per token."""
        return token_grid()

    def plain_codes(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Codes and the tokens' scales, for a backend that multiplies and no more."""
        return INT8Quantizer.quantize_per_token(x)

    def of_plain_codes(self, x: mx.array, found: tuple[mx.array, mx.array]) -> mx.array:
        """The output for x, whose codes these are."""
        weight = self.weight, self.weight_scale
        y = INT8LinearFunction.multiply(*found, *weight, self._backend_name, x.dtype)
        if "bias" in self:
            y = y + self.bias.astype(mx.float32)
        return y.astype(x.dtype)

    def bias_row(self) -> mx.array | None:
        """Of the bias table."""
        return self.prepared.bias

    def mixes_biases(self) -> bool:
        """No bias changes over the steps."""
        return False

    def leads_to(self, other: nn.Module) -> bool:
        """A token's scale is not known before all of its outputs are."""
        return False

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, backend: str = AUTO, *, block_size: int = 0
    ) -> INT8Linear:
        """A scale for each output channel, or for each block of that many inputs."""
        codes, scale = quantized(linear.weight, block_size, type(linear).__name__)
        return cls.from_quantized(codes, scale, linear.get("bias"), backend)

    @classmethod
    def from_quantized(
        cls,
        codes: mx.array,
        scale: mx.array,
        bias: mx.array | None = None,
        backend: str = AUTO,
    ) -> INT8Linear:
        """Of int8 codes and their float32 scales."""
        return cls.__new__(cls)._take(codes, scale, bias, backend)

    @classmethod
    def shell(
        cls,
        rows: int,
        columns: int,
        *,
        bias: bool = True,
        block_size: int = 0,
        backend: str = AUTO,
    ) -> INT8Linear:
        """An empty layer for a quantized checkpoint; until it is loaded, all outputs are NaN."""
        groups = columns // (block_size or columns)
        layer = cls.from_quantized(
            mx.zeros((rows, columns), dtype=mx.int8),
            mx.full((rows, groups), mx.nan),
            mx.zeros((rows,)) if bias else None,
            backend,
        )
        layer._is_shell = True
        return layer

    @property
    def is_shell(self) -> bool:
        """Whether the scales are still to be loaded."""
        return self._is_shell

    def __setitem__(self, key: str, value: Any) -> None:
        """A cast of the whole model leaves codes and scales alone.

        Of a shell it is refused: what is loaded after it could not be told from what was cast.
        """
        held = self.get(key)
        if key in PROTECTED and held is not None and held.dtype != value.dtype:
            if self._is_shell:
                raise UserError(
                    f"{key} of an INT8 layer that is still empty was given as {value.dtype}, it "
                    f"is {held.dtype}: load the quantized checkpoint first, cast the model then"
                )
            return
        super().__setitem__(key, value)
        if key == "weight_scale" and held is not None:
            self._is_shell = False
        if key in READ:
            self.forget()

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.forget()

    def unfreeze(self, *args: Any, **kwargs: Any) -> INT8Linear:
        """Codes cannot be trained: stays frozen, as MLX's own quantized layers do."""
        super().unfreeze(*args, **kwargs)
        return self.freeze(recurse=False)

    @property
    def backend(self) -> str:
        """As it was asked for."""
        return self._backend_name

    def _extra_repr(self) -> str:
        rows, columns = self.weight.shape
        text = f"input_dims={columns}, output_dims={rows}, bias={'bias' in self}"
        if (groups := self.weight_scale.shape[1]) > 1:
            text += f", block_size={columns // groups}"
        return f"{text}, backend={self._backend_name}"

    def __call__(self, x: mx.array) -> mx.array:
        """(…, columns) to (…, rows), in the dtype of x."""
        if self._fuses and x.ndim > 1 and x.size:
            return self.of_codes(x, self.codes(x))
        return INT8LinearFunction.apply(
            x, self.weight, self.weight_scale, self.get("bias"), self._backend_name
        )

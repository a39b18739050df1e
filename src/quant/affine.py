"""A layer taken apart: what enters its product, the product itself, and what is added to it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from ..errors import UserError
from .grid import dequantize
from .int8 import INT8Linear
from .int8_operators import INT8LinearFunction, INT8Quantizer
from .linear import QuantizedLinear


class Affine(Protocol):
    """y = product(entered(x)) + bias, and a branch beside it where the layer has one."""

    def entered(self, x: mx.array) -> mx.array:
        """float32, as the product takes it."""

    def expect(self, largest: int | None) -> None:
        """The product will be asked for codes of up to `largest`, or for floats (None)."""

    def product(self, codes: mx.array, factor: mx.array | None) -> mx.array:
        """Of factor·codes, or of floats; float32, and nothing added."""

    def sums(self) -> mx.array | None:
        """(outputs,) product of an input of ones, float32; none where floats are multiplied."""

    def beside(self, entered: mx.array, dtype: mx.Dtype) -> mx.array | None:
        """What takes the input as it is; float32."""

    def bias(self, ndim: int) -> mx.array | None:
        """float32; `steady` says whether it is the same at all steps."""

    @property
    def steady(self) -> bool: ...


class QuantizedAffine:
    """This project's quantized linear. Its input is shifted and smoothed before the product."""

    def __init__(self, layer: QuantizedLinear) -> None:
        self.layer = layer

    def entered(self, x: mx.array) -> mx.array:
        self.layer.check_input(x)
        return self.layer.centred(x).astype(mx.float32)

    def expect(self, largest: int | None) -> None:
        self.layer.expect(largest)

    def product(self, codes: mx.array, factor: mx.array | None) -> mx.array:
        return self.layer.multiply(codes, factor)

    def sums(self) -> mx.array:
        return row_sums(self.layer.packed.codes(), self.layer.scales)

    def beside(self, entered: mx.array, dtype: mx.Dtype) -> mx.array | None:
        return self.layer.low_rank(entered, dtype) if "low_rank_up" in self.layer else None

    def bias(self, ndim: int) -> mx.array | None:
        return self.layer.bias_here(ndim) if "bias" in self.layer else None

    @property
    def steady(self) -> bool:
        return "bias" not in self.layer or len(self.layer.bias) == 1


class FloatAffine:
    """A layer that multiplies floats: a plain linear or convolution, or one that is packed.

    In a `frame`, a quantized linear, it sees the input that the other sees: shifted, smoothed.
    """

    def __init__(self, layer: nn.Module, frame: QuantizedLinear | None = None) -> None:
        self.layer, self.frame = layer, frame
        self._multiply = multiplier(layer)

    def entered(self, x: mx.array) -> mx.array:
        return (x if self.frame is None else self.frame.centred(x)).astype(mx.float32)

    def expect(self, largest: int | None) -> None:
        """Nothing is prepared, whatever is to come."""

    def product(self, codes: mx.array, factor: mx.array | None) -> mx.array:
        x = codes if factor is None else codes * factor
        if self.frame is not None and "smoothing" in self.frame:
            x = x * self.frame.smoothing
        return self._multiply(x).astype(mx.float32)

    def sums(self) -> None:
        """An input that is the same in all channels is multiplied with the rest of it."""

    def beside(self, entered: mx.array, dtype: mx.Dtype) -> mx.array | None:
        return None

    def bias(self, ndim: int) -> mx.array | None:
        bias = self.layer.get("bias")
        bias = None if bias is None else bias.astype(mx.float32)
        if self.frame is None or "shift" not in self.frame:
            return bias
        nothing = mx.zeros((*[1] * (ndim - 1), self.frame.shift.shape[1]))
        moved = -self.product(self.entered(nothing), None)
        return moved if bias is None else moved + bias

    @property
    def steady(self) -> bool:
        return self.frame is None or len(self.frame.get("shift", (0,))) == 1


class ByteAffine(FloatAffine):
    """INT8: codes are multiplied as codes, by the layer's own backend; floats as floats."""

    def product(self, codes: mx.array, factor: mx.array | None) -> mx.array:
        if factor is None:
            return super().product(codes, None)
        weight, scale = self.layer.weight, self.layer.weight_scale
        return INT8LinearFunction.multiply(codes, factor, weight, scale, self.layer.backend)

    def sums(self) -> mx.array:
        return row_sums(self.layer.weight, self.layer.weight_scale)


def row_sums(codes: mx.array, scale: mx.array) -> mx.array:
    """(rows,) float32 of a quantized weight; computed now, as it is asked for before any step."""
    sums = dequantize(codes, scale).sum(axis=1)
    mx.eval(sums)
    return sums


def multiplier(layer: nn.Module) -> Callable[[mx.array], mx.array]:
    """The layer's product without its bias."""
    for kind, product in PRODUCTS.items():
        if isinstance(layer, kind):
            return partial(product, layer)
    raise UserError(
        f"a layer of type {type(layer).__name__} cannot be modulated; valid: "
        f"{', '.join(kind.__name__ for kind in PRODUCTS)}, and this project's QuantizedLinear"
    )


def linear_product(layer: nn.Linear, x: mx.array) -> mx.array:
    return x.astype(layer.weight.dtype) @ layer.weight.T


def packed_product(layer: nn.QuantizedLinear, x: mx.array) -> mx.array:
    return mx.quantized_matmul(
        x.astype(layer.scales.dtype),
        layer.weight,
        scales=layer.scales,
        biases=layer.biases,
        transpose=True,
        group_size=layer.group_size,
        bits=layer.bits,
    )


def convolved(layer: nn.Conv2d, x: mx.array) -> mx.array:
    return mx.conv2d(
        x.astype(layer.weight.dtype),
        layer.weight,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
    )


def byte_product(layer: INT8Linear, x: mx.array) -> mx.array:
    return x @ INT8Quantizer.dequantize(layer.weight, layer.weight_scale).T


PRODUCTS = {
    INT8Linear: byte_product,
    nn.Linear: linear_product,
    nn.QuantizedLinear: packed_product,
    nn.Conv2d: convolved,
}

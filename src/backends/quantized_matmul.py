"""MLX's own product with packed weights: least memory, since nothing is unpacked."""

from __future__ import annotations

import mlx.core as mx

from .device import Device
from .weight import Weight, group_size, rescaled, sixteen_bit_unit


class QuantizedMatmul:
    name = "quantized_matmul"

    def prepare(self, weight: Weight, dtype: mx.Dtype, largest: int | None) -> dict[str, mx.array]:
        """The packed codes as they are, with scales for the product.

        One scale a row stays outside, in float32, and the product's own scales are a power of
        two, exact in 16 bits. Scales of groups must go in, which makes it a float32 product.
        """
        if Device.here().kind == "cpu":
            dtype = mx.float32  # in 16 bits the CPU's product would also add in 16 bits
        outside, rows, offset = {}, weight.packed.shape[0], -(2 ** (weight.bits - 1))
        if weight.groups > 1:
            inside, biases = weight.scales, offset * weight.scales
        else:
            unit = 1.0 if dtype == mx.float32 else sixteen_bit_unit(weight, largest)
            shape = (rows, weight.columns // group_size(weight.columns))
            # One number each, not a matrix of them: they would take an eighth of the codes. CUDA's
            # product does want the matrix.
            inside, biases = (
                mx.broadcast_to(mx.array(value, dtype=dtype), shape)
                for value in (unit, offset * unit)
            )
            if Device.here().kind == "cuda":
                inside, biases = mx.contiguous(inside), mx.contiguous(biases)
            outside = {"outside": weight.scales[:, 0] / unit}
        return {"packed": weight.packed, "inside": inside, "biases": biases, **outside}

    def multiply(
        self, x: mx.array, factor: mx.array | None, operand: dict[str, mx.array]
    ) -> mx.array:
        """(…, rows) float32; with a factor x holds codes, without one floats."""
        packed, inside = operand["packed"], operand["inside"]
        columns = x.shape[-1]
        if x.size == 0:  # which ends MLX's process
            return mx.zeros((*x.shape[:-1], len(packed)))
        sums = mx.quantized_matmul(
            x.astype(inside.dtype),
            packed,
            inside,
            operand["biases"],
            transpose=True,
            group_size=columns // inside.shape[1],
            bits=32 * packed.shape[1] // columns,
        )
        if "outside" in operand:
            return rescaled(sums, operand["outside"], factor)
        return sums if factor is None else sums * factor

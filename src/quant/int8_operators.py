"""INT8 for any linear: bytes and float32 scales, activations quantized token by token on the fly.

x ≈ scale·code with codes in −127 … 127 and one float32 scale a token; the same for weights, one
scale an output channel or a block of inputs. The sums of code times code are whole numbers, and
exact in the backends that say so.

A row of zeros has codes 0 and the smallest scale. A row that holds NaN or infinity has codes 0
and scale NaN, so that it is NaN after dequantizing and spoils its own outputs only.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..backends import BACKENDS, Backend, Device, integer_kernel, named, select_ready
from ..backends.fusing import Fusing, InputGrid
from ..backends.weight import MLX_GROUP_SIZES, PACKED_COLUMNS
from ..errors import UserError
from .grid import SMALLEST_SCALE, activation_limit, check_floats, dequantize

BITS = 8
LIMIT = activation_limit(BITS)
BLOCK_SIZE = 128
AUTO, FALLBACK = "auto", "fallback"
UNPACK, KEEPS_UNPACKED = "unpack", "dense"
BACKEND_NAMES = (AUTO, FALLBACK, *BACKENDS)


class INT8Quantizer:
    """Floats to int8 and back; largest values set the scales, so nothing is clipped."""

    @staticmethod
    def quantize_per_token(x: mx.array) -> tuple[mx.array, mx.array]:
        """(…, columns) int8, and (…, 1) float32 scales."""
        # Two reductions in the input's own dtype: absolute values would be written out first.
        highest, lowest = x.max(axis=-1, keepdims=True), x.min(axis=-1, keepdims=True)
        largest = mx.maximum(highest.astype(mx.float32), -lowest.astype(mx.float32))
        finite = mx.isfinite(largest)
        scale = mx.where(finite, mx.maximum(largest / LIMIT, SMALLEST_SCALE), mx.nan)
        x = x.astype(mx.float32)
        # An integer cannot be NaN, and what a cast makes of one differs between machines.
        codes = mx.where(finite, mx.clip(mx.round(x / scale), -LIMIT, LIMIT), 0)
        return codes.astype(mx.int8), scale

    @staticmethod
    def quantize_per_channel(weight: mx.array) -> tuple[mx.array, mx.array]:
        """(rows, columns) int8, and (rows, 1) float32 scales, one for each output."""
        check_matrix(weight)
        return INT8Quantizer.quantize_per_token(weight)

    @staticmethod
    def quantize_blockwise(
        weight: mx.array, block_size: int = BLOCK_SIZE
    ) -> tuple[mx.array, mx.array]:
        """(rows, columns) int8, and float32 scales (rows, blocks) of so many inputs each."""
        check_matrix(weight)
        rows, columns = weight.shape
        if block_size < 1 or columns % block_size:
            raise UserError(
                f"block size {block_size} does not divide {columns} input channels; give one that "
                "does, or a scale for each output channel"
            )
        blocks = weight.reshape(rows, columns // block_size, block_size)
        codes, scale = INT8Quantizer.quantize_per_token(blocks)
        return codes.reshape(rows, columns), scale[..., 0]

    @staticmethod
    def dequantize(codes: mx.array, scale: mx.array) -> mx.array:
        """float32 values; the scales are those of any of the three."""
        check_scales(codes, scale)
        if codes.ndim == 2:
            return dequantize(codes, scale)
        return codes.astype(mx.float32) * scale


@dataclass(frozen=True)
class ByteWeight:
    """W ≈ scale·code with each code a byte: what the backends ask of a weight, nothing copied."""

    bytes: mx.array  # (rows, columns) int8
    scales: mx.array  # (rows, groups) float32
    bits: int = BITS

    @property
    def columns(self) -> int:
        return self.bytes.shape[1]

    @property
    def groups(self) -> int:
        return self.scales.shape[1]

    @property
    def packed(self) -> mx.array:
        """As MLX packs codes: each raised by 128, four in a uint32, lowest first."""
        raised = mx.bitwise_xor(mx.view(self.bytes, mx.uint8), mx.array(128, dtype=mx.uint8))
        return mx.view(raised, mx.uint32)

    def codes(self, dtype: mx.Dtype = mx.float32) -> mx.array:
        return self.bytes.astype(dtype)


class INT8LinearFunction:
    """The product itself, for weights that live elsewhere."""

    @staticmethod
    def apply(
        x: mx.array,
        w_int8: mx.array,
        w_scale: mx.array,
        bias: mx.array | None = None,
        backend: str = AUTO,
    ) -> mx.array:
        """(…, columns) to (…, rows) in the dtype of x, nothing prepared or kept.

        Sums of code times code are exact on a CPU, and with `fallback` everywhere; products in 16
        bits agree with them to 16-bit rounding.
        """
        check_floats(x)
        if x.ndim == 1:
            return INT8LinearFunction.apply(x[None], w_int8, w_scale, bias, backend)[0]
        weight = checked_weight(w_int8, w_scale, x.shape[-1])
        check_bias(bias, len(w_int8))
        if x.size == 0:
            return mx.zeros((*x.shape[:-1], len(w_int8)), dtype=x.dtype)
        chosen, dtype = backend_for(backend, x.size // weight.columns, weight, x.dtype)
        operand = chosen.prepare(weight, dtype, LIMIT)
        if isinstance(chosen, Fusing) and chosen.fuses(operand) and x.dtype != mx.float32:
            grid, row = token_grid(), None
            if bias is not None:
                row = chosen.bias_table(operand, bias.astype(mx.float32)[None])[0]
            y = chosen.product(chosen.quantize(x, grid), operand, x.dtype, row)
            return y.reshape(*x.shape[:-1], len(w_int8))
        codes, factor = INT8Quantizer.quantize_per_token(x)
        y = chosen.multiply(codes, factor, operand)
        if bias is not None:
            y = y + bias.astype(mx.float32)
        return y.astype(x.dtype)

    @staticmethod
    def multiply(
        codes: mx.array,
        scale: mx.array,
        w_int8: mx.array,
        w_scale: mx.array,
        backend: str = AUTO,
        dtype: mx.Dtype = mx.float32,
    ) -> mx.array:
        """The float32 product of a quantized input; `dtype` is what products may be taken in."""
        weight = checked_weight(w_int8, w_scale, codes.shape[-1])
        rows = codes.size // weight.columns
        chosen, dtype = backend_for(backend, rows, weight, dtype)
        return chosen.multiply(codes, scale, chosen.prepare(weight, dtype, LIMIT))


def token_grid() -> InputGrid:
    """Scales from each token's own largest value."""
    return InputGrid(mx.ones(1), mx.array([float(LIMIT)]), per_token=True)


def quantized(weight: mx.array, block_size: int, owner: str) -> tuple[mx.array, mx.array]:
    """Codes and scales of a weight, computed now; one that is not finite is an error."""
    check_float_weight(weight, owner)
    if block_size:
        codes, scale = INT8Quantizer.quantize_blockwise(weight, block_size)
    else:
        codes, scale = INT8Quantizer.quantize_per_channel(weight)
    if bool(mx.isnan(scale).any()):
        bad = int(mx.isnan(scale).any(axis=1).sum())
        raise UserError(
            f"the weight holds NaN or infinity in {bad} of its {len(scale)} output channels; give "
            "a sound checkpoint"
        )
    mx.eval(codes, scale)
    return codes, scale


def backend_for(
    name: str, rows: int, weight: ByteWeight, dtype: mx.Dtype
) -> tuple[Backend, mx.Dtype]:
    """What multiplies so many rows, and the dtype that it takes products in."""
    check_backend(name)
    device = Device.here()
    if name == FALLBACK:
        return named(UNPACK), mx.float32
    # On the CPU 16-bit products are slow.
    dtype = mx.float32 if device.kind == "cpu" else dtype
    if name == AUTO:
        shape, integers = (len(weight.bytes), weight.columns), weight.groups == 1
        name = select_ready(device, rows, *shape, integers=integers).name
        if name == KEEPS_UNPACKED:  # here it would unpack at every call, which takes longest
            name = (integer_kernel(*shape) if integers else None) or UNPACK
        name = name if packable(name, weight) else UNPACK
    check_packable(name, weight)
    # What is unpacked once and kept would take as much memory as the floats did.
    return named(UNPACK if name == KEEPS_UNPACKED else name), dtype


def packable(name: str, weight: ByteWeight) -> bool:
    """Whether the backend takes a weight of that shape."""
    if name in (UNPACK, KEEPS_UNPACKED):
        return True
    size = weight.columns // weight.groups
    fits = weight.groups == 1 or name == "reference" or size in MLX_GROUP_SIZES
    return weight.columns % PACKED_COLUMNS == 0 and fits


def check_packable(name: str, weight: ByteWeight) -> None:
    if not packable(name, weight):
        raise UserError(
            f"backend {name!r} takes multiples of {PACKED_COLUMNS} input channels, in blocks of "
            f"{', '.join(map(str, sorted(MLX_GROUP_SIZES)))} where there are blocks; not "
            f"{weight.columns} in {weight.groups}; use {AUTO!r} or {FALLBACK!r}"
        )


def check_backend(name: str) -> None:
    if name not in BACKEND_NAMES:
        raise UserError(f"unknown backend {name!r}; valid: {', '.join(BACKEND_NAMES)}")


def check_matrix(weight: mx.array) -> None:
    if weight.ndim != 2 or weight.size == 0:
        raise UserError(
            f"a weight of shape {tuple(weight.shape)} is no matrix; valid: (outputs, inputs)"
        )


def check_float_weight(weight: mx.array, owner: str) -> None:
    """Raises for codes, which are no weight without their scales; `owner` is a layer's type."""
    if not mx.issubdtype(weight.dtype, mx.floating):
        dtype = str(weight.dtype).removeprefix("mlx.core.")
        raise UserError(
            f"the weight of {owner} is {dtype}, which is codes; valid: floats; give the 16-bit "
            "linear that it was made from"
        )


def check_bias(bias: mx.array | None, rows: int) -> None:
    if bias is not None and tuple(bias.shape) != (rows,):
        raise UserError(
            f"a bias of shape {tuple(bias.shape)} does not fit a weight of {rows} outputs; valid: "
            f"{(rows,)}; give that of the weight's own layer, or none"
        )


def check_scales(codes: mx.array, scale: mx.array) -> None:
    """Raises unless each row, or in a matrix each of its equal blocks, has a scale."""
    *rows, columns = codes.shape or (0,)
    *own, groups = scale.shape or (0,)
    several = groups > 1 and len(rows) != 1
    if own != rows or several or groups == 0 or columns % groups:
        valid = ", ".join(map(str, [*rows, "blocks" if len(rows) == 1 else 1]))
        blocks = f", the blocks dividing {columns}" if len(rows) == 1 else ""
        raise UserError(
            f"scales of shape {tuple(scale.shape)} do not fit codes of shape "
            f"{tuple(codes.shape)}; valid: ({valid}){blocks}; give those that the codes were "
            "quantized with"
        )


def checked_weight(codes: mx.array, scale: mx.array, inputs: int | None = None) -> ByteWeight:
    """Raises unless these are int8 codes and float32 scales that fit each other and the input."""
    check_matrix(codes)
    if codes.dtype != mx.int8 or scale.dtype != mx.float32:
        raise UserError(
            f"codes are {codes.dtype} and scales {scale.dtype}; valid: int8 and float32"
        )
    check_scales(codes, scale)
    columns = codes.shape[1]
    if inputs is not None and inputs != columns:
        raise UserError(f"an input of {inputs} channels meets an INT8 weight of {columns}")
    return ByteWeight(codes, scale)

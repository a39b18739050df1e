"""Integer grids: scales, codes and back.

A weight is W ≈ scale·code with codes in -2^(bits-1) … 2^(bits-1) - 1. Scales are float32 of shape
(rows, groups): one group spans the whole row unless a group size is given. An activation is
x ≈ scale·code + shift with codes in -Q … Q, Q = 7, 31, 127 for 4, 6, 8 bits.
"""

from __future__ import annotations

import mlx.core as mx

from ..errors import UserError

GROUP_SIZES = (0, 32, 64, 128)  # 0: the whole row, one scale per output channel
NO_FRACTION = 1.5 * 2.0**23
SMALLEST_SCALE = 1e-12  # of an all-zero row, whose codes are then 0
CLIP_RATIOS = tuple(1 - 0.025 * i for i in range(27))  # of the largest weight, 1 down to 0.35


def check_bits(bits: int, what: str = "bits") -> None:
    if not 2 <= bits <= 8:
        raise UserError(f"{what} must be 2 to 8, got {bits}")


def check_floats(x: mx.array) -> None:
    """Raises for whole numbers, which a layer would round its output to."""
    if not mx.issubdtype(x.dtype, mx.floating):
        dtype = str(x.dtype).removeprefix("mlx.core.")
        raise UserError(f"an input of {dtype} meets a quantized layer; valid: floats")


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code of a weight."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def activation_limit(bits: int) -> int:
    """Q, the largest code of an activation; the smallest is -Q."""
    return 2 ** (bits - 1) - 1


def whole(x: mx.array) -> mx.array:
    """float32 x to the nearest whole number, ties to the even one, for |x| below 2^22.

    On a CPU two additions take less than half the time of MLX's `round`: beside 1.5·2^23 a float32
    has no digits left after the point. A compiler of GPU kernels might take them for nothing.
    """
    if mx.default_device() == mx.Device(mx.cpu):
        return (x + NO_FRACTION) - NO_FRACTION
    return mx.round(x)


def fine_limit(bits: int) -> int:
    """The largest fine code where one bit of a code says its region."""
    return 2 ** (bits - 2) - 1


def coarse_limit(bits: int, sides: int) -> int:
    """The largest coarse code, in coarse steps: one side alone has the room of two."""
    return fine_limit(bits) if sides == 2 else activation_limit(bits)


def grouped(weight: mx.array, group_size: int) -> mx.array:
    """(rows, columns) as (rows, groups, columns of a group)."""
    rows, columns = weight.shape
    if group_size not in GROUP_SIZES:
        valid = ", ".join(map(str, GROUP_SIZES))
        raise UserError(f"group size {group_size} is not possible; valid: {valid}")
    size = group_size or columns
    if columns % size:
        raise UserError(f"group size {group_size} does not divide {columns} input channels")
    return weight.reshape(rows, columns // size, size)


def absmax_scale(weight: mx.array, bits: int, group_size: int = 0) -> mx.array:
    """(rows, groups) float32 scales that clip nothing."""
    largest = mx.abs(grouped(weight.astype(mx.float32), group_size)).max(axis=-1)
    return mx.maximum(largest / code_range(bits)[1], SMALLEST_SCALE)


def spread(scale: mx.array, columns: int) -> mx.array:
    """(rows, groups) scales as (rows, columns), one per weight."""
    rows, groups = scale.shape
    return mx.broadcast_to(scale[..., None], (rows, groups, columns // groups)).reshape(rows, -1)


def nearest_codes(weight: mx.array, scale: mx.array, bits: int) -> mx.array:
    """(rows, columns) int8 codes, each the nearest on its grid."""
    low, high = code_range(bits)
    ratio = weight.astype(mx.float32) / spread(scale, weight.shape[1])
    return mx.clip(mx.round(ratio), low, high).astype(mx.int8)


def dequantize(codes: mx.array, scale: mx.array) -> mx.array:
    """float32 weights of codes."""
    return codes.astype(mx.float32) * spread(scale, codes.shape[1])


def activation_codes(
    x: mx.array, scale: mx.array, bits: int, shift: mx.array | None = None
) -> mx.array:
    """float32 codes, whole numbers in -Q … Q; scale broadcasts, shift is per channel."""
    limit = activation_limit(bits)
    x = x.astype(mx.float32)
    return mx.clip(mx.round((x if shift is None else x - shift) / scale), -limit, limit)


def fake_quantize(
    x: mx.array, scale: mx.array, bits: int, shift: mx.array | None = None
) -> mx.array:
    """x as it is after quantization and back, in its own dtype."""
    rounded = activation_codes(x, scale, bits, shift) * scale
    return (rounded if shift is None else rounded + shift).astype(x.dtype)


def clipped_scale(
    weight: mx.array, bits: int, group_size: int = 0, importance: mx.array | None = None
) -> mx.array:
    """(rows, groups) scales: of several clip ratios the one with the least weighted error.

    `importance` is per input channel, such as the mean square of what the channel carries. Ratio
    1, which clips nothing, is always a candidate.
    """
    weight = weight.astype(mx.float32)
    rows, columns = weight.shape
    absmax = absmax_scale(weight, bits, group_size)
    per_column = mx.ones((columns,)) if importance is None else importance.astype(mx.float32)
    best, least = absmax, mx.full(absmax.shape, mx.inf)
    for ratio in CLIP_RATIOS:
        scale = absmax * ratio
        error = weight - dequantize(nearest_codes(weight, scale, bits), scale)
        cost = mx.square(error) * per_column
        cost = cost.reshape(rows, absmax.shape[1], -1).sum(axis=-1)
        best, least = mx.where(cost < least, scale, best), mx.minimum(cost, least)
        mx.eval(best, least)
    return best


def output_error(weight: mx.array, rounded: mx.array, hessian: mx.array) -> mx.array:
    """(rows,) squared error of each output channel over the inputs that made the Hessian XᵀX."""
    difference = weight.astype(mx.float32) - rounded
    return ((difference @ hessian) * difference).sum(axis=-1)


def guarded_scale(weight: mx.array, bits: int, group_size: int, hessian: mx.array) -> mx.array:
    """The clipped scales, but absmax in output channels that nearest rounding serves better so."""
    absmax = absmax_scale(weight, bits, group_size)
    clipped = clipped_scale(weight, bits, group_size, mx.diag(hessian))
    costs = [
        output_error(weight, dequantize(nearest_codes(weight, scale, bits), scale), hessian)
        for scale in (absmax, clipped)
    ]
    return mx.where((costs[1] <= costs[0])[:, None], clipped, absmax)

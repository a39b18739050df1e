"""GPTQ: columns are rounded one after the other, each error made good by the columns to come.

Frantar et al., arXiv:2210.17323. The scales are fixed beforehand and the columns taken in the order
of falling activation power (act-order), so that groups of scales stay where they are.
"""

from __future__ import annotations

import mlx.core as mx

from .grid import code_range, spread

DAMPING = 0.01  # of the mean diagonal, added to the Hessian's
BLOCK_COLUMNS = 32  # that are rounded before the rest learns of it
SMALLEST_POWER = 1e-30  # of inputs that are all zero


def gptq_codes(
    weight: mx.array,
    scale: mx.array,
    bits: int,
    hessian: mx.array,
    damping: float = DAMPING,
) -> mx.array:
    """(rows, columns) int8 codes; the Hessian is XᵀX of the inputs, (columns, columns).

    A column whose input is always zero costs nothing whatever its code; it is rounded to nearest.
    """
    hessian = hessian.astype(mx.float32)
    power = mx.diag(hessian)
    order = mx.argsort(-power)
    factor = inverse_factor(hessian[order][:, order], damping)
    codes = rounded_in_order(
        weight.astype(mx.float32)[:, order], spread(scale, weight.shape[1])[:, order], bits, factor
    )
    return codes[:, mx.argsort(order)].astype(mx.int8)


def inverse_factor(hessian: mx.array, damping: float) -> mx.array:
    """Upper triangular U with UᵀU = H⁻¹, H damped; one Cholesky and one triangular inverse.

    Reversing rows and columns turns the lower factor of H into an upper one, whose inverse is U.
    """
    power = mx.diag(hessian)
    mean = mx.maximum(power.mean(), SMALLEST_POWER)
    # A dead column would make H singular.
    added = damping * mean + mx.where(power > 0, 0.0, mean)
    reversed_ = (hessian + mx.diag(added))[::-1, ::-1]
    lower = mx.linalg.cholesky(reversed_, stream=mx.cpu)
    return mx.linalg.tri_inv(lower, stream=mx.cpu)[::-1, ::-1]


def rounded_in_order(weight: mx.array, scale: mx.array, bits: int, factor: mx.array) -> mx.array:
    """float32 codes of the columns from left to right; scale is per weight."""
    # Column by column means row by row of the transpose, where each lies in one piece.
    rest, scale, pieces = weight.T, scale.T, []
    for start in range(0, len(rest), BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, len(factor))
        codes, errors = round_columns(
            rest[: end - start], scale[start:end], bits, factor[start:end, start:end]
        )
        # The later columns learn of a block's errors at once, in one product.
        rest = rest[end - start :] - factor[start:end, end:].T @ errors
        mx.eval(rest, codes)
        pieces.append(codes)
        if end == len(factor):
            break
    return mx.concatenate(pieces).T


def round_columns(
    columns: mx.array, scale: mx.array, bits: int, factor: mx.array
) -> tuple[mx.array, mx.array]:
    """Codes of some neighbouring columns, and their errors in units of the factor's diagonal."""
    low, high = code_range(bits)
    codes, errors = [], []
    for place, step in enumerate(scale):
        value, columns = columns[0], columns[1:]
        code = mx.clip(mx.round(value / step), low, high)
        error = (value - code * step) / factor[place, place]
        columns = columns - factor[place, place + 1 :, None] * error
        codes.append(code)
        errors.append(error)
    return mx.stack(codes), mx.stack(errors)

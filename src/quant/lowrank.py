"""Low rank: W ≈ Q(W − A·B) + A·B beside the codes, and two thin layers in the place of one.

A·B is found by a singular value decomposition of W·L, where L·Lᵀ says what an error of W costs: no
other A·B of its rank loses less. What is rounded is W − A·B; what rounding leaves can be fitted
by a branch again, in turns, as long as that helps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..backends import Weight
from ..errors import UserError
from .artifacts import LayerConfig
from .gptq import gptq_codes
from .grid import dequantize, guarded_scale, output_error
from .int8_operators import (
    AUTO,
    INT8LinearFunction,
    INT8Quantizer,
    check_backend,
    check_bias,
    check_float_weight,
    check_matrix,
)
from .linear import QuantizedLinear, Runtime, as_float32, step_bias
from .packing import pack_codes

WEIGHTINGS = ("plain", "power", "hessian")  # L: one, the inputs' root mean squares, Cholesky's
DAMPING = 0.01  # of the mean power, added to every input's
SMALLEST_POWER = 1e-30  # of inputs that are all zero
BRANCH_BYTES = 2  # of a weight of the branch, 16 bits
Branch = tuple[mx.array, mx.array]  # B (rank, columns) and A (rows, rank), as QuantizedLinear's


@dataclass(frozen=True)
class Metric:
    """L of an error's cost |E·L|², and how to undo it."""

    times: Callable[[mx.array], mx.array]
    undo: Callable[[mx.array], mx.array]


def metric(weighting: str, hessian: mx.array) -> Metric:
    """The Hessian is XᵀX of the inputs, (columns, columns)."""
    if weighting not in WEIGHTINGS:
        raise UserError(f"unknown weighting {weighting!r}; valid: {', '.join(WEIGHTINGS)}")
    if weighting == "plain":
        return Metric(lambda m: m, lambda m: m)
    hessian = hessian.astype(mx.float32)
    power = mx.diag(hessian)
    damping = DAMPING * mx.maximum(power.mean(), SMALLEST_POWER)
    if weighting == "power":
        root = mx.sqrt(power + damping)
        return Metric(lambda m: m * root, lambda m: m / root)
    lower = mx.linalg.cholesky(hessian + damping * mx.eye(len(hessian)), stream=mx.cpu)
    inverse = mx.linalg.tri_inv(lower, stream=mx.cpu)
    return Metric(lambda m: m @ lower, lambda m: m @ inverse)


def branch_of(matrix: mx.array, rank: int, cost: Metric) -> Branch:
    """The best B and A of that rank, float16 values: that is what is stored, so what is fitted."""
    u, s, vt = mx.linalg.svd(cost.times(matrix.astype(mx.float32)), stream=mx.cpu)
    root = mx.sqrt(s[:rank])
    down, up = cost.undo(root[:, None] * vt[:rank]), u[:, :rank] * root
    # Equal sizes of both, so that neither leaves the range of 16 bits.
    sizes = [mx.maximum(mx.linalg.norm(m, axis=a), 1e-20) for m, a in ((down, 1), (up, 0))]
    balance = mx.sqrt(sizes[1] / sizes[0])
    return tuple(half(m) for m in (down * balance[:, None], up / balance))


def half(matrix: mx.array) -> mx.array:
    """Rounded to 16 bits, as float32."""
    return matrix.astype(mx.float16).astype(mx.float32)


def product(branch: Branch) -> mx.array:
    """A·B, (rows, columns) float32."""
    down, up = branch
    return up @ down


@dataclass(frozen=True)
class Residual:
    """W ≈ scale·codes + A·B."""

    codes: mx.array  # (rows, columns) int8
    scale: mx.array  # (rows, groups) float32
    branch: Branch | None
    error: float  # squared, of the outputs over the inputs that made the Hessian

    def weight(self) -> mx.array:
        """(rows, columns) float32."""
        rounded = dequantize(self.codes, self.scale)
        return rounded if self.branch is None else rounded + product(self.branch)

    def nbytes(self, bits: int) -> int:
        """Of the codes packed, their scales and the branch."""
        branch = 0 if self.branch is None else sum(part.size for part in self.branch)
        return self.codes.size * bits // 8 + 4 * self.scale.size + BRANCH_BYTES * branch


def round_residual(
    weight: mx.array,
    hessian: mx.array,
    rank: int,
    *,
    bits: int = 4,
    group_size: int = 0,
    weighting: str = "plain",
    rounds: int = 3,
) -> Residual:
    """GPTQ on W − A·B, A·B first from W by that weighting, then in turns from what GPTQ leaves.

    The best of all turns is kept. Rank 0 is GPTQ alone.
    """
    weight = weight.astype(mx.float32)
    check_sound(weight, hessian)
    check_rank(rank, *weight.shape, least=0)
    if rank == 0:
        return rounded_without(weight, None, hessian, bits, group_size)
    branch, cost = branch_of(weight, rank, metric(weighting, hessian)), metric("hessian", hessian)
    best = found = rounded_without(weight, branch, hessian, bits, group_size)
    for _ in range(rounds):
        rounded = dequantize(found.codes, found.scale)
        branch = branch_of(weight - rounded, rank, cost)
        refitted = costed(weight, found.codes, found.scale, branch, hessian)
        found = rounded_without(weight, branch, hessian, bits, group_size)
        best = min(best, refitted, found, key=lambda residual: residual.error)
    return best


def rounded_without(
    weight: mx.array, branch: Branch | None, hessian: mx.array, bits: int, group_size: int
) -> Residual:
    """GPTQ's codes of what the branch leaves."""
    rest = weight if branch is None else weight - product(branch)
    scale = guarded_scale(rest, bits, group_size, hessian)
    codes = gptq_codes(rest, scale, bits, hessian)
    return costed(weight, codes, scale, branch, hessian)


def costed(
    weight: mx.array, codes: mx.array, scale: mx.array, branch: Branch | None, hessian: mx.array
) -> Residual:
    found = Residual(codes, scale, branch, 0.0)
    error = output_error(weight, found.weight(), hessian).sum().item()
    return Residual(codes, scale, branch, error)


def branched_linear(
    linear: nn.Linear,
    hessian: mx.array,
    rank: int,
    *,
    bits: int = 4,
    group_size: int = 0,
    grid: LayerConfig | None = None,
    runtime: Runtime | None = None,
    **fitting: object,
) -> QuantizedLinear:
    """The layer of codes with its branch; the Hessian is that of the shifted, smoothed input."""
    smoothing = None if grid is None else as_float32(grid.smoothing)
    weight = linear.weight.astype(mx.float32)
    weight = weight if smoothing is None else weight * smoothing
    found = round_residual(weight, hessian, rank, bits=bits, group_size=group_size, **fitting)
    branch = None if found.branch is None else tuple(p.astype(mx.float16) for p in found.branch)
    return QuantizedLinear(
        Weight(pack_codes(found.codes, bits), found.scale, bits),
        bias=step_bias(linear, linear.get("bias"), grid),
        grid=grid,
        smoothing=smoothing,
        low_rank=branch,
        dtype=linear.weight.dtype,
        runtime=runtime,
    )


def check_sound(weight: mx.array, hessian: mx.array) -> None:
    """Raises unless both are finite, and the Hessian is of the weight's inputs."""
    check_matrix(weight)
    columns = weight.shape[1]
    if tuple(hessian.shape) != (columns, columns):
        raise UserError(
            f"a Hessian of shape {tuple(hessian.shape)} does not fit a weight of {columns} inputs; "
            f"valid: {(columns, columns)}, XᵀX of its inputs"
        )
    for name, matrix in (("weight", weight), ("Hessian", hessian)):
        if bad := int((~mx.isfinite(matrix)).sum()):
            raise UserError(
                f"the {name} holds NaN or infinity, {bad} of its {matrix.size} numbers; valid: "
                "finite ones; give a sound checkpoint, and inputs that are finite"
            )


def check_rank(rank: int, rows: int, columns: int, least: int = 1) -> None:
    if not least <= rank <= min(rows, columns):
        raise UserError(
            f"rank {rank} is not possible for a {rows}×{columns} weight; valid: {least} to "
            f"{min(rows, columns)}"
        )


class ALRDLinearINT8(nn.Module):
    """x → B (16 bits) → latent, quantized token by token → A (int8, a scale an output channel)."""

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        rank: int,
        bias: bool = True,
        backend: str = AUTO,
    ) -> None:
        super().__init__()
        check_rank(rank, output_dims, input_dims)
        check_backend(backend)
        self.down = mx.zeros((rank, input_dims), dtype=mx.float16)
        self.up = mx.zeros((output_dims, rank))
        if bias:
            self.bias = mx.zeros((output_dims,))
        self._backend_name = backend

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int | None = None,
        *,
        hessian: mx.array | None = None,
        error: float | None = None,
        size: int | None = None,
        rounds: int = 3,
        backend: str = AUTO,
    ) -> ALRDLinearINT8:
        """With int8 weights, fitted to the inputs that made the Hessian (all alike without one).

        Give the rank; or `error`, the share of the outputs' power that may be lost, for the least
        rank that keeps to it before rounding; or `size` in bytes, for the largest rank that fits.
        """
        check_float_weight(linear.weight, type(linear).__name__)
        weight = linear.weight.astype(mx.float32)
        check_matrix(weight)
        rows, columns = weight.shape
        hessian = mx.eye(columns) if hessian is None else hessian.astype(mx.float32)
        check_sound(weight, hessian)
        check_bias(linear.get("bias"), rows)
        rank = chosen_rank(weight, hessian, rank, error, size)
        layer = cls(columns, rows, rank, "bias" in linear, backend)
        down, layer.up = alternated(weight, hessian, rank, rounds)
        layer.down = down.astype(mx.float16)
        if "bias" in linear:
            layer.bias = linear.bias
        layer.prepare_int8_weights()
        return layer

    def prepare_int8_weights(self) -> None:
        """A as int8 from now on; the float one is let go."""
        if "up" in self:
            self.up_int8, self.up_scale = INT8Quantizer.quantize_per_channel(self.up)
            mx.eval(self.up_int8, self.up_scale)
            del self.up
            self.freeze()

    def __setitem__(self, key: str, value: mx.array) -> None:
        """A cast of the whole model leaves codes and scales alone."""
        held = self.get(key)
        if key in ("up_int8", "up_scale") and held is not None and held.dtype != value.dtype:
            return
        super().__setitem__(key, value)

    def latent(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """B·x as (…, rank) int8 and (…, 1) float32 scales: what is to be kept of an input."""
        return INT8Quantizer.quantize_per_token(x @ self.down.T.astype(x.dtype))

    def forward_int8(self, x: mx.array) -> mx.array:
        """(…, inputs) to (…, outputs) by whole numbers, in the dtype of x."""
        if "up_int8" not in self:
            raise UserError("forward_int8 needs int8 weights; call prepare_int8_weights() first")
        codes, scale = self.latent(x)
        weights = (self.up_int8, self.up_scale)
        y = INT8LinearFunction.multiply(codes, scale, *weights, self._backend_name, x.dtype)
        return (y + self.bias if "bias" in self else y).astype(x.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        """By whole numbers where the int8 weights are there, else in floats."""
        if "up_int8" in self:
            return self.forward_int8(x)
        y = x @ self.down.T.astype(x.dtype) @ self.up.T.astype(x.dtype)
        return y + self.bias.astype(x.dtype) if "bias" in self else y

    def _extra_repr(self) -> str:
        rank, columns = self.down.shape
        rows = len(self.up_int8 if "up_int8" in self else self.up)
        kind = "int8" if "up_int8" in self else "float"
        return f"input_dims={columns}, output_dims={rows}, rank={rank}, weights={kind}"


def alrd_bytes(rows: int, columns: int, rank: int) -> int:
    """Of B in 16 bits, A in 8 and its scales."""
    return rank * (2 * columns + rows) + 4 * rows


def chosen_rank(
    weight: mx.array, hessian: mx.array, rank: int | None, error: float | None, size: int | None
) -> int:
    """The rank that was given, or the one that keeps to the target."""
    if sum(value is not None for value in (rank, error, size)) != 1:
        raise UserError("give one of rank, error (share of power) and size (bytes), and no other")
    rows, columns = weight.shape
    if rank is None and error is not None:
        if not 0 < error < 1:
            raise UserError(f"error {error} is no share of power; valid: between 0 and 1")
        singular = mx.linalg.svd(
            metric("hessian", hessian).times(weight), compute_uv=False, stream=mx.cpu
        )
        power = np.square(np.array(singular, dtype=np.float64))
        lost = 1 - np.cumsum(power) / max(power.sum(), SMALLEST_POWER)
        rank = min(int(np.sum(lost > error)) + 1, len(power))
    elif rank is None:
        rank = min((size - 4 * rows) // (2 * columns + rows), rows, columns)
        if rank < 1:
            raise UserError(
                f"{size} bytes hold no rank of a {rows}×{columns} weight; valid: "
                f"{alrd_bytes(rows, columns, 1)} or more"
            )
    check_rank(rank, rows, columns)
    return rank


def alternated(
    weight: mx.array, hessian: mx.array, rank: int, rounds: int
) -> tuple[mx.array, mx.array]:
    """B and A in turns, each the best for the other; B for an A that is rounded to int8."""
    down, up = balanced(*branch_of(weight, rank, metric("hessian", hessian)), hessian)
    best, least = (down, up), alrd_error(weight, down, up, hessian)
    for _ in range(rounds):
        rounded = int8_values(up)
        down = half(solved(rounded.T @ rounded, rounded.T @ weight))
        kept = alrd_error(weight, down, up, hessian)
        if kept < least:
            best, least = (down, up), kept
        power = down @ hessian
        up = solved(power @ down.T, power @ weight.T).T
        down, up = balanced(down, up, hessian)
        kept = alrd_error(weight, down, up, hessian)
        if kept < least:
            best, least = (down, up), kept
    return best


def int8_values(matrix: mx.array) -> mx.array:
    """As it is after int8 and back."""
    return INT8Quantizer.dequantize(*INT8Quantizer.quantize_per_channel(matrix))


def alrd_error(weight: mx.array, down: mx.array, up: mx.array, hessian: mx.array) -> float:
    return output_error(weight, int8_values(up) @ down, hessian).sum().item()


def balanced(down: mx.array, up: mx.array, hessian: mx.array) -> Branch:
    """All latent channels of equal power, since they share a token's scale; B's largest is 1."""
    power = mx.sqrt(mx.maximum(mx.sum((down @ hessian) * down, axis=1), SMALLEST_POWER))
    down, up = down / power[:, None], up * power
    largest = mx.maximum(mx.abs(down).max(), SMALLEST_POWER)
    return half(down / largest), up * largest


def solved(matrix: mx.array, right: mx.array) -> mx.array:
    """The least squares solution of matrix·x = right, also where the matrix is singular."""
    left, right = (np.array(m, dtype=np.float64) for m in (matrix, right))
    return mx.array(np.linalg.lstsq(left, right, rcond=1e-10)[0].astype(np.float32))

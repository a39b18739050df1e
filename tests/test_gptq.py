"""GPTQ against a plain NumPy reference, and the clip search that its scales come from."""

from __future__ import annotations

from src.quant import grid
from src.quant.gptq import gptq_codes, inverse_factor

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def reference_codes(weight, scale, bits, hessian, damping=0.01):
    """GPTQ with act-order as the paper has it, column by column in float64."""
    columns = weight.shape[1]
    order = np.argsort(-np.diag(hessian), kind="stable")
    hessian = hessian[order][:, order].copy()
    power = np.diag(hessian)
    np.fill_diagonal(hessian, power + damping * power.mean() + np.where(power > 0, 0, power.mean()))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    left, scale, codes = weight[:, order].copy(), scale[:, order], np.zeros(weight.shape)
    for j in range(columns):
        limits = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        codes[:, j] = np.clip(np.round(left[:, j] / scale[:, j]), *limits)
        error = (left[:, j] - codes[:, j] * scale[:, j]) / upper[j, j]
        left[:, j:] -= np.outer(error, upper[j, j:])
    return codes[:, np.argsort(order)]


def problem(rows, columns, seed, correlated=0.3):
    """A weight and XᵀX of inputs whose channels are correlated and differ in power."""
    rng = np.random.default_rng(seed)
    mix = correlated * rng.standard_normal((columns, columns)) + np.eye(columns)
    x = rng.standard_normal((4 * columns, columns)) @ mix * np.exp(rng.standard_normal(columns))
    weight = rng.standard_normal((rows, columns)) / np.sqrt(columns)
    return mx.array(weight.astype(np.float32)), mx.array((x.T @ x).astype(np.float32))


def total_error(weight, codes, scale, hessian) -> float:
    return grid.output_error(weight, grid.dequantize(codes, scale), hessian).sum().item()


@pytest.mark.parametrize("rows, columns, group", [(64, 96, 0), (48, 320, 0), (32, 256, 64)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_equals_the_numpy_reference(rows, columns, group, bits):
    weight, hessian = problem(rows, columns, seed=rows)
    scale = grid.clipped_scale(weight, bits, group, mx.diag(hessian))
    codes = gptq_codes(weight, scale, bits, hessian)
    wide = np.array(grid.spread(scale, columns), dtype=np.float64)
    wanted = reference_codes(
        np.array(weight, dtype=np.float64), wide, bits, np.array(hessian, dtype=np.float64)
    )
    assert codes.dtype == mx.int8
    got = total_error(weight, codes, scale, hessian)
    assert got == pytest.approx(total_error(weight, mx.array(wanted), scale, hessian), rel=1e-3)
    # A tie that falls the other way in float32 moves the codes after it; there are hardly any.
    rows_off = np.any(np.array(codes) != wanted, axis=1).mean()
    same = ~np.any(np.array(codes) != wanted, axis=1)
    dequantized = np.array(grid.dequantize(codes, scale))
    assert np.allclose(dequantized[same], (wanted * wide)[same], rtol=1e-5, atol=0)
    assert rows_off <= 0.1


@settings(max_examples=20)
@given(bits=st.integers(2, 8), seed=st.integers(0, 1000))
def test_never_worse_than_nearest_where_inputs_are_correlated(bits, seed):
    weight, hessian = problem(16, 64, seed)
    scale = grid.absmax_scale(weight, bits)
    nearest = total_error(weight, grid.nearest_codes(weight, scale, bits), scale, hessian)
    assert total_error(weight, gptq_codes(weight, scale, bits, hessian), scale, hessian) < nearest


def test_dead_inputs_change_nothing_and_are_rounded_to_nearest():
    weight, hessian = problem(16, 64, seed=3)
    alive = mx.array(np.arange(64) % 4 != 1)
    hessian = hessian * alive[:, None] * alive[None]
    scale = grid.absmax_scale(weight, 4)
    codes = gptq_codes(weight, scale, 4, hessian)
    nearest = grid.nearest_codes(weight, scale, 4)
    assert mx.all(mx.where(alive, True, codes == nearest)).item()
    assert mx.all(gptq_codes(weight, scale, 4, mx.zeros((64, 64))) == nearest).item()


def test_uncorrelated_inputs_leave_nearest_rounding():
    weight, _ = problem(16, 64, seed=4)
    scale = grid.absmax_scale(weight, 4)
    codes = gptq_codes(weight, scale, 4, mx.diag(mx.arange(1.0, 65.0)))
    assert mx.all(codes == grid.nearest_codes(weight, scale, 4)).item()


def test_inverse_factor_is_the_upper_cholesky_of_the_inverse():
    _, hessian = problem(4, 80, seed=5)
    upper = np.array(inverse_factor(hessian, 0.01), dtype=np.float64)
    damped = np.array(hessian, dtype=np.float64)
    damped += 0.01 * np.diag(damped).mean() * np.eye(80)
    assert np.allclose(np.tril(upper, -1), 0)
    assert np.allclose(upper.T @ upper @ damped, np.eye(80), atol=1e-3)


@settings(max_examples=30)
@given(bits=st.integers(2, 8), seed=st.integers(0, 1000), group=st.sampled_from([0, 32]))
def test_guarded_scale_is_never_worse_than_absmax_in_any_output_channel(bits, seed, group):
    weight, hessian = problem(8, 64, seed)

    def cost(scale):
        rounded = grid.dequantize(grid.nearest_codes(weight, scale, bits), scale)
        return np.array(grid.output_error(weight, rounded, hessian))

    absmax = grid.absmax_scale(weight, bits, group)
    guarded = grid.guarded_scale(weight, bits, group, hessian)
    assert guarded.shape == absmax.shape
    assert np.all(cost(guarded) <= cost(absmax) * (1 + 1e-5))


def test_clip_search_follows_the_importance_of_the_channels():
    """A lone large weight on a channel that carries nothing is clipped away."""
    weight = mx.array(np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32))
    weight[:, 5] = 20.0
    importance = mx.ones((64,))
    importance[5] = 0.0
    clipped = grid.clipped_scale(weight, 4, 0, importance)
    assert mx.all(clipped < 0.5 * grid.absmax_scale(weight, 4)).item()

"""The branch beside the codes, and the two thin layers in the place of one."""

from __future__ import annotations

from src.cache_adaround_data import cache_adaround_data
from src.calibration.block_cache import BlockCache
from src.errors import UserError
from src.generate_calibration_data import generate_calibration_data
from src.metrics.fidelity import reference_trajectories, teacher_forced_sqnr
from src.models.load import load_pipeline
from src.models.prompts import load_prompts
from src.quant.artifacts import LayerConfig
from src.quant.grid import output_error
from src.quant.int8 import INT8Linear
from src.quant.int8_operators import INT8Quantizer
from src.quant.linear import QuantizedLinear, Runtime
from src.quant.lowrank import (
    BRANCH_BYTES,
    WEIGHTINGS,
    ALRDLinearINT8,
    alrd_bytes,
    branch_of,
    branched_linear,
    metric,
    product,
    round_residual,
)
from src.quant.schedule import Schedule, Step

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_unflatten

from .helpers import relative_error

ROWS, COLUMNS, TOKENS = 48, 96, 400


def inputs_of(seed: int = 0, columns: int = COLUMNS) -> np.ndarray:
    """Channels of very different power, some of them alike."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((TOKENS, columns)) @ rng.standard_normal((columns, columns)) / 10
    return (mixed * np.exp(rng.standard_normal(columns))).astype(np.float32)


def linear_of(seed: int = 1, rank: int = 12, bias: bool = True) -> nn.Linear:
    """A few strong directions over noise."""
    rng = np.random.default_rng(seed)
    strong = rng.standard_normal((ROWS, rank)) @ rng.standard_normal((rank, COLUMNS))
    linear = nn.Linear(COLUMNS, ROWS, bias)
    weight = strong + 0.3 * rng.standard_normal((ROWS, COLUMNS))
    linear.weight = mx.array(weight.astype(np.float32) / 20)
    if bias:
        linear.bias = mx.array(rng.standard_normal(ROWS).astype(np.float32))
    return linear


def hessian_of(x: np.ndarray) -> mx.array:
    return mx.array(x.T @ x)


def lost(weight: mx.array, other: mx.array, hessian: mx.array) -> float:
    return output_error(weight, other, hessian).sum().item()


@settings(max_examples=6)
@given(seed=st.integers(0, 999), rank=st.sampled_from([1, 5, 24, ROWS]))
def test_the_branch_is_the_best_of_its_rank_under_its_cost(seed, rank):
    """Eckart and Young: what is lost is the rest of the singular values of W·L."""
    weight = np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    hessian = hessian_of(inputs_of(seed))
    for weighting in WEIGHTINGS:
        cost = metric(weighting, hessian)
        branch = branch_of(mx.array(weight), rank, cost)
        assert [tuple(part.shape) for part in branch] == [(rank, COLUMNS), (ROWS, rank)]
        left = np.array(cost.times(mx.array(weight) - product(branch)), np.float64)
        singular = np.linalg.svd(np.array(cost.times(mx.array(weight)), np.float64))[1]
        whole = np.linalg.norm(singular)
        assert abs(np.linalg.norm(left) - np.linalg.norm(singular[rank:])) < 3e-3 * whole


def test_each_weighting_is_best_where_it_looks():
    linear, x = linear_of(), inputs_of()
    hessian, weight = hessian_of(x), linear.weight
    by_output = {
        name: lost(weight, product(branch_of(weight, 8, metric(name, hessian))), hessian)
        for name in WEIGHTINGS
    }
    assert by_output["hessian"] < by_output["power"] < by_output["plain"]


def test_the_branch_is_stored_in_sixteen_bits_without_loss():
    branch = branch_of(linear_of().weight, 8, metric("hessian", hessian_of(inputs_of())))
    for part in branch:
        back = part.astype(mx.float16).astype(mx.float32)
        np.testing.assert_array_equal(np.array(back), np.array(part))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("group_size", [0, 32])
def test_rank_and_turns_lessen_the_outputs_error(weighting, group_size):
    weight, hessian = linear_of().weight, hessian_of(inputs_of())
    errors = [
        round_residual(
            weight, hessian, rank, group_size=group_size, weighting=weighting, rounds=rounds
        ).error
        for rank, rounds in ((0, 0), (8, 0), (8, 2), (24, 2))
    ]
    assert errors[0] > errors[1] >= errors[2] > errors[3]
    found = round_residual(weight, hessian, 8, weighting=weighting)
    assert found.error == pytest.approx(lost(weight, found.weight(), hessian), rel=1e-4)


def test_bytes_are_those_of_what_is_kept():
    weight, hessian = linear_of().weight, hessian_of(inputs_of())
    plain = round_residual(weight, hessian, 0, group_size=32)
    assert plain.nbytes(4) == ROWS * COLUMNS // 2 + 4 * ROWS * 3
    assert round_residual(weight, hessian, 8).nbytes(4) == (
        ROWS * COLUMNS // 2 + 4 * ROWS + 2 * 8 * (ROWS + COLUMNS)
    )


def test_inputs_that_are_always_zero_break_nothing():
    x = inputs_of()
    x[:, ::3] = 0
    linear = linear_of(bias=False)
    for hessian in (hessian_of(x), mx.zeros((COLUMNS, COLUMNS))):
        for weighting in WEIGHTINGS:
            found = round_residual(linear.weight, hessian, 8, weighting=weighting)
            assert np.isfinite(np.array(found.weight())).all()
        layer = ALRDLinearINT8.from_linear(linear, 8, hessian=hessian)
        assert np.isfinite(np.array(layer(mx.array(x)))).all()


@pytest.mark.parametrize("smoothing", [False, True])
def test_the_layer_adds_its_branch_to_its_codes(smoothing):
    linear, x = linear_of(), inputs_of()
    rng = np.random.default_rng(3)
    factors = rng.uniform(0.5, 2, COLUMNS).astype(np.float32) if smoothing else None
    shift = rng.standard_normal(COLUMNS).astype(np.float32)
    centred = (x - shift) / (factors if smoothing else 1)
    hessian, wanted = hessian_of(centred), np.array(linear(mx.array(x)))
    grid = LayerConfig([8], [1.0], shift, factors)
    errors = []
    for rank in (0, 8, 24):
        run = Runtime(Step(Schedule((1.0,))), "token")
        layer = branched_linear(linear, hessian, rank, grid=grid, runtime=run)
        assert isinstance(layer, QuantizedLinear) and ("low_rank_up" in layer) == bool(rank)
        if rank:  # held and saved in the bytes that are counted for it
            held = layer.low_rank_down.nbytes + layer.low_rank_up.nbytes
            assert held == BRANCH_BYTES * rank * (ROWS + COLUMNS)
        errors.append(relative_error(layer(mx.array(x)), wanted))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.06


def test_alrd_is_what_its_parts_say():
    """x → B in floats → int8 latent → A by whole numbers, bias last."""
    linear, x = linear_of(), mx.array(inputs_of())
    layer = ALRDLinearINT8.from_linear(linear, 12, hessian=hessian_of(inputs_of()))
    codes, scale = layer.latent(x)
    assert codes.dtype == mx.int8 and codes.shape == (TOKENS, 12) and scale.shape == (TOKENS, 1)
    sums = np.array(codes).astype(np.int64) @ np.array(layer.up_int8).astype(np.int64).T
    wanted = sums * (np.array(scale, np.float64) * np.array(layer.up_scale).T)
    wanted = wanted + np.array(linear.bias)
    np.testing.assert_allclose(np.array(layer(x)), wanted, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_array_equal(np.array(layer.forward_int8(x)), np.array(layer(x)))
    assert layer.down.dtype == mx.float16 and "up" not in layer
    assert repr(layer) == "ALRDLinearINT8(input_dims=96, output_dims=48, rank=12, weights=int8)"


def test_alrd_of_full_rank_is_the_linear_to_eight_bits():
    linear, x = linear_of(), inputs_of()
    layer = ALRDLinearINT8.from_linear(linear, ROWS, hessian=hessian_of(x))
    assert relative_error(layer(mx.array(x)), linear(mx.array(x))) < 0.015


def test_turns_and_the_inputs_powers_make_alrd_better():
    linear, x = linear_of(bias=False), inputs_of()
    hessian, wanted = hessian_of(x), linear(mx.array(x))
    unweighted = ALRDLinearINT8.from_linear(linear, 12)
    once = ALRDLinearINT8.from_linear(linear, 12, hessian=hessian, rounds=0)
    turns = ALRDLinearINT8.from_linear(linear, 12, hessian=hessian, rounds=4)

    def error(layer: ALRDLinearINT8) -> float:
        stored = INT8Quantizer.dequantize(layer.up_int8, layer.up_scale)
        return lost(linear.weight, stored @ layer.down.astype(mx.float32), hessian)

    assert error(turns) < error(once) < error(unweighted)
    assert relative_error(turns(mx.array(x)), wanted) < relative_error(
        unweighted(mx.array(x)), wanted
    )


def test_ranks_by_error_and_by_size():
    linear, x = linear_of(bias=False), inputs_of()
    hessian, power = hessian_of(x), lost(linear.weight, 0, hessian_of(x))
    ranks = []
    for share in (0.2, 0.05, 0.01):
        layer = ALRDLinearINT8.from_linear(linear, error=share, hessian=hessian)
        ranks.append(len(layer.down))
        stored = INT8Quantizer.dequantize(layer.up_int8, layer.up_scale)
        kept = lost(linear.weight, stored @ layer.down.astype(mx.float32), hessian) / power
        assert kept < 1.1 * share
        fewer = branch_of(linear.weight, len(layer.down) - 1, metric("hessian", hessian))
        assert len(layer.down) == 1 or lost(linear.weight, product(fewer), hessian) > 0.9 * (
            share * power
        )
    assert ranks[0] < ranks[1] < ranks[2]
    layer = ALRDLinearINT8.from_linear(linear, size=3000)
    held = layer.down.nbytes + layer.up_int8.nbytes + layer.up_scale.nbytes
    rank = len(layer.down)
    assert held == alrd_bytes(ROWS, COLUMNS, rank) <= 3000 < alrd_bytes(ROWS, COLUMNS, rank + 1)


def test_alrd_by_hand_runs_in_floats_until_its_weights_are_prepared():
    layer = ALRDLinearINT8(COLUMNS, ROWS, 8)
    rng = np.random.default_rng(0)
    layer.down = mx.array(rng.standard_normal((8, COLUMNS)).astype(np.float16))
    layer.up = mx.array(rng.standard_normal((ROWS, 8)).astype(np.float32))
    x = mx.array(inputs_of())
    wanted = layer(x)
    with pytest.raises(UserError, match=r"call prepare_int8_weights\(\) first"):
        layer.forward_int8(x)
    layer.prepare_int8_weights()
    assert 0 < relative_error(layer(x), wanted) < 0.02


def test_a_cast_leaves_alrds_codes_and_scales_alone():
    layer = ALRDLinearINT8.from_linear(linear_of(), 8)
    scale = np.array(layer.up_scale)
    layer.set_dtype(mx.bfloat16)
    assert layer.up_int8.dtype == mx.int8 and layer.down.dtype == mx.bfloat16
    np.testing.assert_array_equal(np.array(layer.up_scale), scale)


def test_what_does_not_fit_is_refused():
    linear, hessian = linear_of(), hessian_of(inputs_of())
    with pytest.raises(UserError, match="rank 49 is not possible for a 48×96 weight; valid: 0 to"):
        round_residual(linear.weight, hessian, 49)
    with pytest.raises(UserError, match="unknown weighting 'svd'; valid: plain, power, hessian"):
        round_residual(linear.weight, hessian, 4, weighting="svd")
    with pytest.raises(UserError, match="rank 0 is not possible .* valid: 1 to 48"):
        ALRDLinearINT8.from_linear(linear, 0)
    with pytest.raises(UserError, match="give one of rank, error .* and size"):
        ALRDLinearINT8.from_linear(linear, 4, size=1000)
    with pytest.raises(UserError, match="error 1.5 is no share of power"):
        ALRDLinearINT8.from_linear(linear, error=1.5)
    with pytest.raises(UserError, match="100 bytes hold no rank of a 48×96 weight; valid: 432"):
        ALRDLinearINT8.from_linear(linear, size=100)


def test_what_holds_nan_or_is_of_another_layer_is_named():
    linear, hessian = linear_of(), hessian_of(inputs_of())
    broken = mx.where(hessian == hessian[3, 5], mx.inf, hessian)
    fits = {
        "ALRD": lambda layer, h: ALRDLinearINT8.from_linear(layer, 4, hessian=h),
        "residual": lambda layer, h: round_residual(layer.weight, h, 4),
    }
    for fit in fits.values():
        with pytest.raises(UserError, match="the Hessian holds NaN or infinity, 2 of its 9216 num"):
            fit(linear, broken)
        with pytest.raises(UserError, match=r"a Hessian of shape \(4, 4\) .* valid: \(96, 96\)"):
            fit(linear, mx.eye(4))
    for bias in (mx.zeros(5), mx.zeros(1)):
        linear.bias = bias
        with pytest.raises(UserError, match=r"does not fit a weight of 48 outputs; valid: \(48,\)"):
            ALRDLinearINT8.from_linear(linear, 4)
    with pytest.raises(UserError, match="the weight of INT8Linear is int8, which is codes"):
        ALRDLinearINT8.from_linear(INT8Linear.from_linear(linear_of()), 4)
    linear.weight[3, 4] = mx.nan
    for fit in fits.values():
        with pytest.raises(UserError, match="the weight holds NaN or infinity, 1 of its 4608 num"):
            fit(linear, hessian)


@pytest.mark.slow
def test_rank_16_gains_two_decibels_on_nano(tmp_path):
    """GPTQ on what the branch leaves against GPTQ alone, in the layers that inference uses."""
    from tools.bench_lowrank import collected

    folder = generate_calibration_data("nano", tmp_path / "c", num_images=16)
    cache = cache_adaround_data(folder, num_images=16, stride=6)
    pipeline = load_pipeline("nano")
    model = pipeline.transformer
    hessians = collected(pipeline, BlockCache.open(cache, pipeline))
    texts = load_prompts("nano_evaluation")[:12]
    reference = reference_trajectories(pipeline, texts, num_steps=30, stride=10)
    linears = {path: layer for path, layer in model.named_modules() if path in hessians}
    found = {}
    for rank in (0, 16):
        layers = [(p, branched_linear(linears[p], h, rank)) for p, h in hessians.items()]
        model.update_modules(tree_unflatten(layers))
        found[rank] = teacher_forced_sqnr(model, reference).mean()
    assert found[16] - found[0] > 2

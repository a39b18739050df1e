"""The quantized layer against the formula of the design, written in NumPy."""

from __future__ import annotations

import dataclasses

from src.backends import BACKENDS, named
from src.errors import UserError
from src.quant.artifacts import LayerConfig, RoundedLayer
from src.quant.grid import activation_limit, code_range
from src.quant.int8 import INT8Linear
from src.quant.linear import QuantizedLinear, Runtime
from src.quant.schedule import Schedule, Step

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

ROWS, COLUMNS = 48, 192
SIGMAS = (0.9, 0.5, 0.1)


def linear_of(seed: int = 0, bias: bool = True, dtype=mx.float32) -> nn.Linear:
    rng = np.random.default_rng(seed)
    linear = nn.Linear(COLUMNS, ROWS, bias=bias)
    linear.weight = mx.array(rng.standard_normal((ROWS, COLUMNS)).astype(np.float32) / 14)
    if bias:
        linear.bias = mx.array(rng.standard_normal(ROWS).astype(np.float32))
    linear.set_dtype(dtype)
    return linear


def rounded_of(linear: nn.Linear, bits: int = 4, groups: int = 1, **more) -> RoundedLayer:
    low, high = code_range(bits)
    rng = np.random.default_rng(5)
    codes = rng.integers(low, high + 1, linear.weight.shape).astype(np.int8)
    scale = rng.uniform(1e-3, 1e-2, (ROWS, groups)).astype(np.float32)
    return RoundedLayer(codes, scale, np.ones(3, np.float32), **more)


def grid_of(bits=(4, 6, 8), shift=False, smoothing=False, steps=1) -> LayerConfig:
    rng = np.random.default_rng(7)
    shape = (COLUMNS,) if steps == 1 else (steps, COLUMNS)
    return LayerConfig(
        list(bits),
        [0.3, 0.07, 0.02],
        rng.standard_normal(shape).astype(np.float32) if shift else None,
        rng.uniform(0.2, 5, COLUMNS).astype(np.float32) if smoothing else None,
    )


def formula(x, linear, rounded, grid, index, a_scale="static") -> np.ndarray:
    """y = s·a·Σ c·x̂ + b + W z, at the step of that index, in float64 after the rounding."""
    x = np.asarray(x, np.float32)
    if grid.shift is not None:
        z = np.atleast_2d(grid.shift)[index if np.ndim(grid.shift) == 2 else 0]
        x = x - z
    if grid.smoothing is not None:
        x = x / grid.smoothing
    limit = np.float32(activation_limit(grid.bits[index]))
    scale = np.float32(grid.scale[index])
    if a_scale == "token":
        scale = np.maximum(np.abs(x).max(-1, keepdims=True) / limit, np.float32(1e-12))
    codes = np.clip(np.rint(x / scale), -limit, limit).astype(np.float64)
    groups = rounded.scale.shape[1]
    y = codes @ (rounded.codes * np.repeat(rounded.scale, COLUMNS // groups, 1)).T * scale
    if "bias" in linear:
        y = y + np.array(linear.bias.astype(mx.float32) if rounded.bias is None else rounded.bias)
    if grid.shift is not None:
        y = y + z.astype(np.float64) @ np.array(linear.weight.astype(mx.float32)).T
    return y


def layer_of(linear, rounded, grid, *, bits=4, sigma=0.5, **runtime) -> QuantizedLinear:
    step = Step(Schedule(SIGMAS))
    step.set_sigma(sigma)
    run = Runtime(step, **runtime)
    return QuantizedLinear.from_artifacts(linear, rounded, bits=bits, grid=grid, runtime=run)


def input_of(*shape, seed=3) -> mx.array:
    rng = np.random.default_rng(seed)
    return mx.array(3 * rng.standard_normal((*shape, COLUMNS)).astype(np.float32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("a_scale", ["static", "token"])
@given(
    index=st.integers(0, 2),
    shape=st.sampled_from([(), (1,), (7,), (1, 1), (2, 5), (3, 1), (2, 3, 4)]),
    shift=st.sampled_from([False, 1, 3]),
    smoothing=st.booleans(),
    bias=st.booleans(),
    groups=st.sampled_from([1, 3, 6]),
    bits=st.sampled_from([4, 6, 8]),
)
def test_output_is_the_formula(
    backend, a_scale, index, shape, shift, smoothing, bias, groups, bits
):
    linear = linear_of(bias=bias)
    grid = grid_of(shift=bool(shift), smoothing=smoothing, steps=shift or 1)
    rounded = rounded_of(linear, bits, groups, smoothing=grid.smoothing)
    layer = layer_of(
        linear, rounded, grid, bits=bits, sigma=SIGMAS[index], a_scale=a_scale,
        backend=named(backend),
    )  # fmt: skip
    x = input_of(*shape)
    got, wanted = np.array(layer(x)), formula(x, linear, rounded, grid, index, a_scale)
    assert got.shape == (*shape, ROWS)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("coarse, sides", [(2, 1), (3, 2), (8, 1)])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_codes_of_two_regions(backend, coarse, sides, index):
    """Fine near 0 and coarse beyond, as LayerConfig says; the sums stay whole numbers."""
    linear = linear_of(bias=False)
    rounded = RoundedLayer(
        rounded_of(linear).codes, np.ones((ROWS, 1), np.float32), np.ones(3, np.float32)
    )
    grid = dataclasses.replace(grid_of(), scale=[0.25] * 3, coarse=coarse, coarse_sides=sides)
    layer = layer_of(linear, rounded, grid, sigma=SIGMAS[index], backend=named(backend))
    x = np.concatenate([np.array(input_of(6)), 40 * np.array(input_of(6))])
    limit = activation_limit(grid.bits[index])
    fine = (limit - 1) // 2
    last = limit if sides == 1 else fine
    codes = np.clip(np.rint(x / 0.25), -fine, fine)
    large = coarse * np.clip(np.rint(x / 0.25 / coarse), -last, last)
    codes = np.where((np.abs(x) if sides == 2 else x) / 0.25 <= fine, codes, large)
    sums = codes.astype(np.int64) @ rounded.codes.T.astype(np.int64)
    np.testing.assert_array_equal(np.array(layer(mx.array(x))), sums * np.float32(0.25))


def test_sums_of_coarse_codes_are_exact_at_their_very_largest():
    """8·127 times a code of 4 bits: beyond 2^24 from 2064 columns on."""
    linear = nn.Linear(6144, 2, bias=False)
    codes = np.full((2, 6144), -8, np.int8)
    codes[1, ::3] = -7
    rounded = RoundedLayer(codes, np.ones((2, 1), np.float32), np.ones(1, np.float32))
    grid = LayerConfig([8], [1.0], coarse=8)
    for backend in ("reference", "dense"):
        runtime = Runtime(backend=named(backend))
        layer = QuantizedLinear.from_artifacts(linear, rounded, grid=grid, runtime=runtime)
        x = np.full((1, 6144), 1e6, np.float32)
        x[0, 5] = 1
        sums = np.clip(x.astype(np.int64), 0, 1016) @ codes.T.astype(np.int64)
        np.testing.assert_array_equal(np.array(layer(mx.array(x))), sums.astype(np.float32))


def test_between_steps_the_bias_follows_the_shift():
    """W z of the bias and z of the quantizer are those of the same place between two steps."""
    linear, grid = linear_of(), grid_of(bits=(8, 8, 8), shift=True, steps=3)
    linear_exact = rounded_of(linear)
    weight = linear_exact.codes * linear_exact.scale
    linear.weight = mx.array(weight.astype(np.float32))
    layer = layer_of(linear, linear_exact, grid, sigma=0.3, a_scale="token")
    x = input_of(4)
    wanted = np.array(linear(x))
    np.testing.assert_allclose(np.array(layer(x)), wanted, atol=0.02 * np.abs(wanted).max())


def test_rows_of_a_batch_may_be_at_different_steps():
    linear, grid = linear_of(), grid_of(shift=True, steps=3)
    rounded = rounded_of(linear)
    x = input_of(3, 4)
    together = layer_of(linear, rounded, grid, sigma=mx.array(SIGMAS))(x)
    for row, sigma in enumerate(SIGMAS):
        alone = layer_of(linear, rounded, grid, sigma=sigma)(x[row : row + 1])
        np.testing.assert_array_equal(np.array(together[row]), np.array(alone[0]))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_bit_inputs_give_outputs_of_their_dtype(backend, dtype):
    linear, grid = linear_of(dtype=dtype), grid_of(shift=True, smoothing=True)
    rounded = rounded_of(linear, smoothing=grid.smoothing)
    layer, x = layer_of(linear, rounded, grid, backend=named(backend)), input_of(2, 5).astype(dtype)
    y = layer(x)
    assert y.dtype == dtype
    wanted = formula(np.array(x.astype(mx.float32)), linear, rounded, grid, 1)
    got = np.array(y.astype(mx.float32))
    epsilon = 2**-10 if dtype == mx.float16 else 2**-7
    np.testing.assert_allclose(got, wanted, rtol=0, atol=epsilon * np.abs(wanted).max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [False, True])
def test_without_a_grid_the_input_stays_in_floats(backend, smoothing):
    linear, grid = linear_of(), grid_of(smoothing=smoothing)
    rounded = rounded_of(linear, smoothing=grid.smoothing)
    layer, x = layer_of(linear, rounded, None, backend=named(backend)), input_of(2, 5)
    weight = rounded.codes * rounded.scale / (grid.smoothing if smoothing else 1)
    wanted = np.array(x) @ weight.T + np.array(linear.bias)
    np.testing.assert_allclose(np.array(layer(x)), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert "activations" not in repr(layer)


def test_with_weights_only_the_shift_stays():
    """Biases of weights that were rounded for a shifted input are for such an input only."""
    linear, grid = linear_of(), grid_of(shift=True, smoothing=True)
    rounded = rounded_of(linear, smoothing=grid.smoothing)
    layer, x = layer_of(linear, rounded, grid, weights_only=True), input_of(2, 5)
    moved = (np.array(x) - grid.shift) / grid.smoothing @ (rounded.codes * rounded.scale).T
    wanted = moved + np.array(linear.bias) + np.array(linear.weight) @ grid.shift
    np.testing.assert_allclose(np.array(layer(x)), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert "activations" not in repr(layer) and "shift" in repr(layer)


@pytest.mark.parametrize("a_scale", ["static", "token"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_not_hidden(backend, a_scale, value):
    """NaN spoils its token. Infinity does so too where it sets the scale; a static grid takes it
    as it takes all that is too large, for the last code."""
    linear, grid = linear_of(), grid_of()
    layer = layer_of(linear, rounded_of(linear), grid, a_scale=a_scale, backend=named(backend))
    x = np.array(input_of(2, 3))
    clean = np.array(layer(mx.array(x)))
    x[1, 2, 7] = value
    got = np.array(layer(mx.array(x)))
    untouched = np.ones((2, 3), bool)
    untouched[1, 2] = False
    np.testing.assert_array_equal(got[untouched], clean[untouched])
    if np.isnan(value) or a_scale == "token":
        assert np.isnan(got[1, 2]).all()
    else:
        x[1, 2, 7] = np.sign(value) * 1e6
        np.testing.assert_array_equal(got, np.array(layer(mx.array(x))))


def test_empty_inputs_give_empty_outputs():
    linear = linear_of(dtype=mx.float16)
    for a_scale in ("static", "token"):
        layer = layer_of(linear, rounded_of(linear), grid_of(), a_scale=a_scale)
        for shape in ((0,), (2, 0), (0, 5)):
            y = layer(mx.zeros((*shape, COLUMNS), dtype=mx.float16))
            assert y.shape == (*shape, ROWS) and y.dtype == mx.float16


def test_a_token_of_zeros_gives_the_bias():
    linear = linear_of()
    layer = layer_of(linear, rounded_of(linear), grid_of(), a_scale="token")
    y = layer(mx.zeros((2, COLUMNS)))
    np.testing.assert_array_equal(np.array(y), np.tile(np.array(linear.bias), (2, 1)))


def test_from_linear_rounds_to_the_nearest():
    linear = linear_of()
    x = input_of(64)
    wanted = np.array(linear(x))
    errors = {}
    for bits, group_size in ((4, 0), (4, 32), (8, 0)):
        layer = QuantizedLinear.from_linear(linear, bits=bits, group_size=group_size)
        got = np.array(layer(x))
        errors[bits, group_size] = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    assert errors[8, 0] < 0.01 < errors[4, 32] < errors[4, 0] < 0.2


def test_a_low_rank_branch_mends_the_rounding():
    linear, grid = linear_of(bias=False), grid_of(bits=(8, 8, 8), shift=True, smoothing=True)
    x = input_of(64)
    wanted = np.array(linear(x))
    weight = np.array(linear.weight) * grid.smoothing
    u, s, v = np.linalg.svd(weight)
    errors = []
    for rank in (0, 16, ROWS):
        parts = (mx.array(s[:rank, None] * v[:rank]), mx.array(u[:, :rank]))
        run = Runtime(Step(Schedule(SIGMAS)), "token")
        layer = QuantizedLinear.from_linear(
            linear, grid=grid, low_rank=parts if rank else None, runtime=run
        )
        got = np.array(layer(x))
        errors.append(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
    assert errors[2] < 1e-5 < errors[1] < errors[0]
    assert "low_rank=48" in repr(layer)


def test_a_cast_of_the_model_leaves_the_layer_alone():
    linear, grid = linear_of(), grid_of(shift=True, smoothing=True)
    rounded = rounded_of(linear, smoothing=grid.smoothing)
    model = nn.Sequential(linear_of(1), layer_of(linear, rounded, grid))
    layer, x = model.layers[1], input_of(2, 5)
    before, kinds = np.array(layer(x)), {k: v.dtype for k, v in layer.parameters().items()}
    model.set_dtype(mx.bfloat16)
    model.update(tree_map(lambda p: p.astype(mx.float16), model.parameters()))
    assert model.layers[0].weight.dtype == mx.float16
    assert {k: v.dtype for k, v in layer.parameters().items()} == kinds
    np.testing.assert_array_equal(np.array(layer(x)), before)


@pytest.mark.parametrize("kernel", ["reference", "dense", "unpack", "quantized_matmul"])
def test_an_input_that_does_not_fit_is_refused_by_every_kernel(kernel):
    """A kernel would read the codes as other ones, or round its output to whole numbers."""
    runtime = Runtime(Step(Schedule(SIGMAS)), backend=named(kernel))
    layer = QuantizedLinear.from_linear(linear_of(), grid=grid_of(), runtime=runtime)
    for shape in ((3, COLUMNS // 2), (2, 3, COLUMNS + 32), (0, COLUMNS // 2)):
        with pytest.raises(UserError, match=f"input of {shape[-1]} channels meets a weight"):
            layer(mx.zeros(shape))
    for dtype in (mx.int32, mx.uint8, mx.bool_, mx.complex64):
        with pytest.raises(UserError, match="valid: floats"):
            layer(mx.ones((3, COLUMNS), dtype=dtype))
        with pytest.raises(UserError, match="valid: floats"):
            INT8Linear.from_linear(linear_of())(mx.ones((3, COLUMNS), dtype=dtype))


def test_layers_are_frozen_and_say_what_they_are():
    linear, grid = linear_of(), grid_of(shift=True, smoothing=True)
    layer = layer_of(linear, rounded_of(linear, groups=3, smoothing=grid.smoothing), grid)
    assert tree_flatten(layer.trainable_parameters()) == []
    layer.unfreeze()
    assert tree_flatten(layer.trainable_parameters()) == []
    assert repr(layer) == (
        "QuantizedLinear(input_dims=192, output_dims=48, bias=True, bits=4, group_size=64, "
        "activations=A4/A6/A8 per step, shift, smoothing, kernel=dense)"
    )
    packed = layer.weight.nbytes + layer.scales.nbytes
    assert packed == ROWS * COLUMNS // 2 + ROWS * 3 * 4


def test_what_does_not_fit_is_refused():
    linear, grid = linear_of(), grid_of()
    with pytest.raises(UserError, match="unknown --a-scale 'row'; valid: static, token"):
        Runtime(a_scale="row")
    other = Runtime(Step(Schedule((0.9, 0.1))))
    with pytest.raises(UserError, match="a layer's grid has 3 steps, its schedule has 2"):
        QuantizedLinear.from_linear(linear, grid=grid, runtime=other)
    with pytest.raises(UserError, match="group size 128 does not divide 192"):
        QuantizedLinear.from_linear(linear, group_size=128)
    rounded = rounded_of(linear)
    thin = RoundedLayer(rounded.codes[:, :64], rounded.scale, rounded.a_scale)
    with pytest.raises(UserError, match=r"codes .* has shape \(48, 64\), the model's .* \(48, 192"):
        QuantizedLinear.from_artifacts(linear, thin)
    ragged = RoundedLayer(rounded.codes, np.ones((ROWS, 5), np.float32), rounded.a_scale)
    with pytest.raises(UserError, match="5 groups of scales do not divide 192"):
        QuantizedLinear.from_artifacts(linear, ragged)
    with pytest.raises(UserError, match="do not fit in 4 bits"):
        QuantizedLinear.from_artifacts(linear, rounded_of(linear, bits=8), bits=4)
    with pytest.raises(ValueError, match="smoothing"):
        QuantizedLinear.from_artifacts(linear, rounded, grid=grid_of(smoothing=True))

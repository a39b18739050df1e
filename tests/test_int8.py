"""INT8 operators: quantizers against their definition, layers against whole numbers in NumPy."""

from __future__ import annotations

import shutil

from src.backends import BACKENDS
from src.backends.cuda_int8 import usable
from src.backends.weight import unpack
from src.errors import UserError
from src.quant.int8 import INT8Linear
from src.quant.int8_operators import BACKEND_NAMES, ByteWeight, INT8LinearFunction, INT8Quantizer

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

COLUMNS, ROWS = 256, 48
EXACT = ("auto", "fallback", "reference", "dense", "unpack")  # on a CPU


def array_of(*shape: int, seed: int = 0, heavy: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.standard_t(3, shape) if heavy else rng.standard_normal(shape)
    return values.astype(np.float32)


def linear_of(
    rows: int = ROWS, columns: int = COLUMNS, bias: bool = True, seed: int = 1
) -> nn.Linear:
    linear = nn.Linear(columns, rows, bias=bias)
    linear.weight = mx.array(array_of(rows, columns, seed=seed))
    if bias:
        linear.bias = mx.array(array_of(rows, seed=seed + 1))
    return linear


def cosine(got: mx.array, wanted: mx.array) -> float:
    a, b = (np.array(m.astype(mx.float32), dtype=np.float64).ravel() for m in (got, wanted))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@given(
    seed=st.integers(0, 2**16),
    shape=st.sampled_from([(1, 1), (3, 32), (2, 5, 96), (64,)]),
    exponent=st.integers(-30, 30),
)
def test_codes_are_the_nearest_and_nothing_is_clipped(seed, shape, exponent):
    x = array_of(*shape, seed=seed) * np.float32(10.0) ** exponent
    codes, scale = INT8Quantizer.quantize_per_token(mx.array(x))
    assert codes.dtype == mx.int8 and scale.dtype == mx.float32
    assert codes.shape == shape and scale.shape == (*shape[:-1], 1)
    back = np.array(INT8Quantizer.dequantize(codes, scale))
    assert (np.abs(back - x) <= 0.5001 * np.array(scale)).all()
    assert np.abs(np.array(codes).astype(int)).max() <= 127


@given(seed=st.integers(0, 2**16), block=st.sampled_from([1, 32, 64, 128, 256]))
def test_a_block_is_quantized_as_if_it_were_alone(seed, block):
    weight = array_of(6, COLUMNS, seed=seed)
    codes, scale = INT8Quantizer.quantize_blockwise(mx.array(weight), block)
    assert scale.shape == (6, COLUMNS // block)
    for i in range(COLUMNS // block):
        part = mx.array(weight[:, i * block : (i + 1) * block])
        own, own_scale = INT8Quantizer.quantize_per_channel(part)
        np.testing.assert_array_equal(np.array(codes[:, i * block :][:, :block]), np.array(own))
        np.testing.assert_array_equal(np.array(scale[:, i]), np.array(own_scale[:, 0]))
    back = np.array(INT8Quantizer.dequantize(codes, scale))
    assert (np.abs(back - weight) <= 0.5001 * np.repeat(np.array(scale), block, axis=1)).all()


def test_rows_of_zeros_have_codes_of_zero_and_a_scale_that_divides():
    codes, scale = INT8Quantizer.quantize_per_token(mx.zeros((2, 32)))
    assert not np.array(codes).any()
    assert (np.array(scale) > 0).all() and np.isfinite(np.array(scale)).all()
    x = mx.zeros((3, COLUMNS))
    layer = INT8Linear.from_linear(linear_of())
    np.testing.assert_array_equal(np.array(layer(x)), np.tile(np.array(layer.bias), (3, 1)))


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_row_and_no_other(backend, value):
    x = array_of(4, COLUMNS)
    layer = INT8Linear.from_linear(linear_of(), backend)
    clean = np.array(layer(mx.array(x)))
    x[2, 7] = value
    codes, scale = INT8Quantizer.quantize_per_token(mx.array(x))
    assert not np.array(codes[2]).any() and np.isnan(np.array(scale[2])).all()
    got = np.array(layer(mx.array(x)))
    assert np.isnan(got[2]).all()
    np.testing.assert_array_equal(got[[0, 1, 3]], clean[[0, 1, 3]])


def test_the_packed_view_holds_the_same_codes():
    codes = mx.array(np.arange(-128, 128).astype(np.int8).reshape(4, 64))
    weight = ByteWeight(codes, mx.ones((4, 1)))
    np.testing.assert_array_equal(np.array(unpack(weight.packed, 8)), np.array(codes))


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("columns", [32, 1024, 1056, 6144])
def test_sums_are_exact_at_their_very_largest(backend, columns):
    """127·127·6144 is beyond 2^24, where float32 has gaps."""
    codes = np.full((3, columns), -127, np.int8)
    codes[1, ::3] += 1
    codes[2, : columns // 2] = 127
    x = np.full((2, columns), 127, np.float32)
    x[1, -1] = 1
    got = INT8LinearFunction.apply(mx.array(x), mx.array(codes), mx.ones((3, 1)), backend=backend)
    wanted = x.astype(np.int64) @ codes.T.astype(np.int64)
    np.testing.assert_array_equal(np.array(got), wanted.astype(np.float32))


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("block", [0, 32, 128])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 1, 5)])
def test_output_is_the_formula(backend, block, bias, shape):
    linear = linear_of(bias=bias)
    layer = INT8Linear.from_linear(linear, backend, block_size=block)
    x = array_of(*shape, COLUMNS, seed=3)
    codes, scale = INT8Quantizer.quantize_per_token(mx.array(x))
    weight = np.array(INT8Quantizer.dequantize(layer.weight, layer.weight_scale), np.float64)
    wanted = np.array(codes).astype(np.float64) * np.array(scale) @ weight.T
    wanted = wanted + (np.array(linear.bias) if bias else 0)
    got = np.array(layer(mx.array(x)))
    assert got.shape == (*shape, ROWS)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("heavy, least", [(False, 0.999), (True, 0.99)])
def test_outputs_point_where_the_floats_do(backend, heavy, least):
    linear, x = linear_of(64, 768), mx.array(array_of(128, 768, seed=4, heavy=heavy))
    wanted = linear(x)
    for block in (0, 128):
        assert cosine(INT8Linear.from_linear(linear, backend, block_size=block)(x), wanted) > least
    function = INT8LinearFunction.apply(
        x, *INT8Quantizer.quantize_per_channel(linear.weight), linear.bias, backend
    )
    assert cosine(function, wanted) > least


@pytest.mark.parametrize("backend", ["auto", "fallback"])
@pytest.mark.parametrize("columns", [1, 37, 100])
def test_any_width_has_a_backend(backend, columns):
    linear = linear_of(5, columns)
    x = mx.array(array_of(9, columns, seed=6))
    assert cosine(INT8Linear(linear.weight, linear.bias, backend)(x), linear(x)) > 0.99
    with pytest.raises(UserError, match=f"multiples of 32 .* not {columns} .*use 'auto'"):
        INT8Linear(linear.weight, backend="reference")(x)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_sixteen_bit_inputs_give_outputs_of_their_dtype(backend, dtype):
    linear = linear_of()
    x = mx.array(array_of(6, COLUMNS, seed=5)).astype(dtype)
    y = INT8Linear.from_linear(linear, backend)(x)
    assert y.dtype == dtype and cosine(y, linear(x.astype(mx.float32))) > 0.999


@pytest.mark.skipif(usable() is None, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_gpu_quantizes_and_multiplies_in_two_kernels(dtype, bias):
    """The same codes and exact sums as everywhere, so that only the last rounding differs."""
    linear, x = linear_of(1000, 1536, bias), array_of(3, 700, 1536, seed=5, heavy=True)
    x[0, 5, 7], x[1, 9, 3], x[2, 11] = np.nan, np.inf, 0
    x = mx.array(x).astype(dtype)
    exact, fused = (
        np.array(INT8Linear.from_linear(linear, backend)(x).astype(mx.float32))
        for backend in ("fallback", "cuda_int8")
    )
    np.testing.assert_array_equal(np.isnan(fused), np.isnan(exact))
    assert np.isnan(exact).sum() == 2000
    rounding = 2**-10 if dtype == mx.float16 else 2**-7
    np.testing.assert_allclose(fused, exact, rtol=rounding, atol=1e-3)


def test_empty_inputs_give_empty_outputs():
    layer = INT8Linear.from_linear(linear_of())
    for shape in ((0, COLUMNS), (2, 0, COLUMNS)):
        assert layer(mx.zeros(shape, dtype=mx.float16)).shape == (*shape[:-1], ROWS)


@pytest.mark.skipif(not shutil.which("g++"), reason="MLX compiles with g++ on a CPU")
def test_a_layer_can_be_compiled():
    """Weights are unpacked within the call, which a compiled step must be able to hold."""
    layer, x = INT8Linear.from_linear(linear_of()), mx.array(array_of(4, COLUMNS))
    compiled = mx.compile(lambda x: layer(x))
    np.testing.assert_allclose(np.array(compiled(x)), np.array(layer(x)), rtol=1e-5, atol=1e-4)


def test_a_layer_takes_one_byte_a_weight_whatever_multiplies():
    for backend in BACKENDS:
        layer = INT8Linear.from_linear(linear_of(), backend)
        layer(mx.array(array_of(64, COLUMNS)))
        held = [v for v in layer.values() if isinstance(v, (mx.array, dict, list))]
        size = sum(leaf.nbytes for _, leaf in tree_flatten(held))
        assert size == ROWS * COLUMNS + 4 * ROWS + 4 * ROWS


def test_casts_and_training_leave_codes_and_scales_alone():
    layer = INT8Linear.from_linear(linear_of())
    model = nn.Sequential(layer, linear_of(8, ROWS))
    before = {name: np.array(layer[name]) for name in ("weight", "weight_scale")}
    model.set_dtype(mx.bfloat16)
    model.update(tree_map(lambda p: p.astype(mx.float16), model.parameters()))
    assert layer.weight.dtype == mx.int8 and layer.weight_scale.dtype == mx.float32
    assert layer.bias.dtype == mx.float16 and model.layers[1].weight.dtype == mx.float16
    for name, held in before.items():
        np.testing.assert_array_equal(np.array(layer[name]), held)
    layer.unfreeze()
    assert tree_flatten(layer.trainable_parameters()) == []


def test_an_empty_layer_gives_nothing_that_looks_like_an_answer(tmp_path):
    full = INT8Linear.from_linear(linear_of(), block_size=64)
    shell = INT8Linear.shell(ROWS, COLUMNS, block_size=64)
    x = mx.array(array_of(3, COLUMNS))
    assert shell.is_shell and np.isnan(np.array(shell(x))).all()
    with pytest.raises(UserError, match="load the quantized checkpoint first, cast the model then"):
        shell.set_dtype(mx.float16)
    with pytest.raises(UserError, match="weight .* was given as .*float32, it is .*int8"):
        shell.load_weights(list(tree_flatten({**full.parameters(), "weight": mx.zeros((48, 256))})))
    path = str(tmp_path / "layer.safetensors")
    mx.save_safetensors(path, dict(tree_flatten(full.parameters())))
    shell.load_weights(path)
    assert not shell.is_shell
    shell.set_dtype(mx.float32)
    np.testing.assert_array_equal(np.array(shell(x)), np.array(full(x)))


def test_what_does_not_fit_is_refused():
    linear = linear_of()
    with pytest.raises(UserError, match="unknown backend 'cuda'; valid: auto, fallback, reference"):
        INT8Linear.from_linear(linear, "cuda")
    with pytest.raises(UserError, match="block size 96 does not divide 256"):
        INT8Linear.from_linear(linear, block_size=96)
    with pytest.raises(UserError, match=r"a weight of shape \(256,\) is no matrix"):
        INT8Quantizer.quantize_per_channel(linear.weight[0])
    layer = INT8Linear.from_linear(linear)
    with pytest.raises(UserError, match="an input of 255 channels meets an INT8 weight of 256"):
        layer(mx.zeros((2, 255)))
    with pytest.raises(UserError, match=r"scales .* \(48, 3\) do not fit codes .* \(48, 256\)"):
        INT8Linear.from_quantized(layer.weight, mx.ones((ROWS, 3)))
    with pytest.raises(UserError, match="valid: int8 and float32"):
        INT8Linear.from_quantized(linear.weight, mx.ones((ROWS, 1)))
    linear.weight[3, 4] = mx.nan
    with pytest.raises(UserError, match="NaN or infinity in 1 of its 48 output channels"):
        INT8Linear.from_linear(linear)


def test_codes_are_no_weight_to_quantize():
    layer = INT8Linear.from_linear(linear_of())
    for linear, dtype in ((layer, "int8"), (nn.QuantizedLinear(64, 64), "uint32")):
        name = type(linear).__name__
        way_out = f"weight of {name} is {dtype}, .*valid: floats; give the 16-bit linear"
        with pytest.raises(UserError, match=way_out):
            INT8Linear.from_linear(linear)
    with pytest.raises(UserError, match="is int8, which is codes"):
        INT8Linear(layer.weight)


@pytest.mark.parametrize("shape", [(), (1,), (ROWS - 1,), (3, ROWS), (1, ROWS)])
def test_a_bias_that_does_not_fit_is_refused(shape):
    bias, weight = mx.zeros(shape), mx.array(array_of(ROWS, COLUMNS))
    codes, scale = INT8Quantizer.quantize_per_channel(weight)
    takes = [
        lambda: INT8Linear(weight, bias),
        lambda: INT8Linear.from_quantized(codes, scale, bias),
        lambda: INT8LinearFunction.apply(mx.ones((2, COLUMNS)), codes, scale, bias),
        lambda: INT8LinearFunction.apply(mx.ones((0, COLUMNS)), codes, scale, bias),
    ]
    for take in takes:
        with pytest.raises(UserError, match=r"not fit a weight of 48 outputs; valid: \(48,\);"):
            take()


@pytest.mark.parametrize(
    "codes, scale, valid",
    [
        ((6, 64), (5, 1), r"\(6, blocks\), the blocks dividing 64"),
        ((6, 64), (6, 7), r"\(6, blocks\), the blocks dividing 64"),
        ((6, 64), (6, 0), r"\(6, blocks\), the blocks dividing 64"),
        ((6, 64), (6,), r"\(6, blocks\), the blocks dividing 64"),
        ((6, 64), (), r"\(6, blocks\), the blocks dividing 64"),
        ((2, 3, 64), (2, 3, 4), r"\(2, 3, 1\)"),
        ((2, 3, 64), (3, 1), r"\(2, 3, 1\)"),
        ((64,), (2,), r"\(1\)"),
    ],
)
def test_scales_that_do_not_fit_are_refused(codes, scale, valid):
    with pytest.raises(UserError, match=f"do not fit codes .*; valid: {valid}; give those"):
        INT8Quantizer.dequantize(mx.zeros(codes, dtype=mx.int8), mx.ones(scale))


def test_layers_say_what_they_are():
    layer = INT8Linear.from_linear(linear_of(), block_size=64)
    wanted = "INT8Linear(input_dims=256, output_dims=48, bias=True, block_size=64, backend=auto)"
    assert repr(layer) == wanted

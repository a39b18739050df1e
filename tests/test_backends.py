"""Every backend against whole numbers summed by NumPy, and against the reference."""

from __future__ import annotations

from src.backends import BACKENDS, Device, Weight, named, select
from src.errors import UserError
from src.quant.grid import activation_limit, code_range
from src.quant.packing import pack_codes

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

LARGEST = activation_limit(8)
EXACT = ("reference", "dense", "unpack")  # in float32
HALVES = {mx.float16: 2**-10, mx.bfloat16: 2**-7}  # of the largest output, after one rounding


def random_codes(seed, shape, bits) -> np.ndarray:
    low, high = code_range(bits)
    return np.random.default_rng(seed).integers(low, high + 1, shape).astype(np.int8)


def random_inputs(seed, shape, bits_a) -> np.ndarray:
    limit = activation_limit(bits_a)
    return np.random.default_rng(seed + 1).integers(-limit, limit + 1, shape)


def product(backend, codes, scale, bits, x, factor, dtype=mx.float32) -> np.ndarray:
    """What the backend gives, float32; without a factor x are floats."""
    weight = Weight(pack_codes(codes, bits), mx.array(np.asarray(scale, np.float32)), bits)
    operand = named(backend).prepare(weight, dtype, LARGEST if factor is not None else None)
    factor = None if factor is None else mx.array(np.float32(factor))
    y = named(backend).multiply(mx.array(np.asarray(x, np.float32)), factor, operand)
    assert y.dtype == mx.float32
    return np.array(y)


@pytest.mark.parametrize("bits_a", [4, 6, 8])
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("backend", EXACT)
@given(
    seed=st.integers(0, 2**16),
    rows=st.sampled_from([1, 2, 7, 33]),
    outputs=st.sampled_from([1, 5, 64]),
    columns=st.sampled_from([32, 96, 192, 1536]),
)
def test_sums_are_exact(backend, bits, bits_a, seed, rows, outputs, columns):
    codes = random_codes(seed, (outputs, columns), bits)
    x = random_inputs(seed, (rows, columns), bits_a)
    got = product(backend, codes, np.ones((outputs, 1)), bits, x, 1.0)
    np.testing.assert_array_equal(got, (x @ codes.T.astype(np.int64)).astype(np.float32))


def test_two_thousand_random_shapes_are_exact():
    """Any number of rows and outputs, none of both too, and what precedes the rows."""
    rng, names = np.random.default_rng(11), [*EXACT, "quantized_matmul"]
    for number in range(2000):
        backend, bits = names[number % len(names)], int(rng.choice([4, 6, 8]))
        outputs, columns = int(rng.integers(1, 80)), 32 * int(rng.integers(1, 14))
        before = tuple(rng.integers(0, 9, rng.integers(1, 3)))
        codes = random_codes(number, (outputs, columns), bits)
        x = random_inputs(number, (*before, columns), int(rng.choice([4, 6, 8])))
        got = product(backend, codes, np.ones((outputs, 1)), bits, x, 1.0)
        wanted = (x @ codes.T.astype(np.int64)).astype(np.float32)
        np.testing.assert_array_equal(got, wanted, err_msg=f"{backend}, {bits} bits, {x.shape}")


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("columns", [132064, 132128])
def test_sums_of_very_many_columns_are_exact_beyond_32_bits_too(backend, columns):
    codes, x = np.full((2, columns), -128, np.int8), np.full((1, columns), 127)
    got = product(backend, codes, np.ones((2, 1)), 8, x, 1.0)
    wanted = x.astype(np.int64) @ codes.T.astype(np.int64)
    np.testing.assert_array_equal(got, wanted.astype(np.float32))


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("bits, columns", [(4, 6144), (6, 6144), (8, 1024), (8, 1056), (8, 6144)])
def test_sums_are_exact_at_their_very_largest(backend, bits, columns):
    """Beyond 2^24 float32 has gaps: only sums of parts, added as integers, come out right."""
    low, _ = code_range(bits)
    codes = np.full((3, columns), low, np.int8)
    codes[1, ::3] += 1  # an odd total, which a float sum along the way would lose
    codes[2, : columns // 2] = -low - 1  # parts that cancel
    x = np.full((2, columns), activation_limit(8))
    x[1, -1] = 1
    wanted = x.astype(np.int64) @ codes.T.astype(np.int64)
    got = product(backend, codes, np.ones((3, 1)), bits, x, 1.0)
    np.testing.assert_array_equal(got, wanted.astype(np.float32))


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_groups_are_summed_one_by_one(backend, size):
    codes, x = random_codes(0, (40, 384), 4), random_inputs(0, (5, 384), 8)
    groups = 384 // size
    sums = [x[:, g * size :][:, :size] @ codes[:, g * size :][:, :size].T for g in range(groups)]
    for group in range(groups):
        only = np.zeros((40, groups))
        only[:, group] = 1
        got = product(backend, codes, only, 4, x, 1.0)
        np.testing.assert_array_equal(got, sums[group])
    scale = np.random.default_rng(1).uniform(1e-3, 1e-2, (40, groups)).astype(np.float32)
    wanted = sum(s * scale[:, g].astype(np.float64) for g, s in enumerate(sums)) * 0.02
    np.testing.assert_allclose(product(backend, codes, scale, 4, x, 0.02), wanted, rtol=1e-4)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("bits, groups", [(4, 1), (4, 3), (6, 1), (6, 6), (8, 1)])
@pytest.mark.parametrize("token", [False, True])
def test_backends_agree_with_the_reference(backend, bits, groups, token):
    rng = np.random.default_rng(0)
    codes, x = random_codes(0, (48, 192), bits), random_inputs(0, (2, 5, 192), 8)
    scale = rng.uniform(1e-3, 1e-2, (48, groups))
    factor = rng.uniform(0.01, 0.1, (2, 5, 1) if token else (1, 1, 1))
    wanted = product("reference", codes, scale, bits, x, factor)
    got = product(backend, codes, scale, bits, x, factor)
    if backend in EXACT:
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_allclose(got, wanted, atol=2e-6 * np.abs(wanted).max())
    for dtype, rounding in HALVES.items():
        got = product(backend, codes, scale, bits, x, factor, dtype)
        np.testing.assert_allclose(got, wanted, atol=rounding * np.abs(wanted).max())


@pytest.mark.parametrize("backend", ["dense", "unpack", "quantized_matmul"])
def test_sixteen_bit_sums_do_not_overflow(backend):
    """At 4 bits and 6144 columns a sum may reach 6 million, float16 ends at 65504."""
    codes, x = np.full((2, 6144), -8, np.int8), np.full((1, 6144), 127)
    got = product(backend, codes, np.full((2, 1), 1e-3), 4, x, 1e-3, mx.float16)
    np.testing.assert_allclose(got, -8 * 127 * 6144 * 1e-6, rtol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("dtype", [mx.float32, *HALVES])
def test_float_inputs(backend, groups, dtype):
    """Weights only: no factor, any input."""
    rng = np.random.default_rng(0)
    codes, scale = random_codes(0, (48, 192), 4), rng.uniform(1e-4, 1e-3, (48, groups))
    x = rng.standard_normal((7, 192)).astype(np.float32)
    wanted = x @ (codes * np.repeat(scale, 192 // groups, axis=1)).T
    got = product(backend, codes, scale, 4, x, None, dtype)
    rounding = 1e-5 if dtype == mx.float32 else 2 * HALVES[dtype]
    np.testing.assert_allclose(got, wanted, atol=rounding * np.abs(wanted).max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits, columns", [(4, 192), (8, 2048)])
def test_nan_spoils_its_own_row_and_no_other(backend, bits, columns):
    codes = random_codes(0, (8, columns), bits)
    x = random_inputs(0, (3, columns), 8).astype(np.float32)
    clean = product(backend, codes, np.ones((8, 1)), bits, x, 1.0)
    x[1, 5] = np.nan
    got = product(backend, codes, np.ones((8, 1)), bits, x, 1.0)
    assert np.isnan(got[1]).all()
    np.testing.assert_array_equal(got[[0, 2]], clean[[0, 2]])


def test_an_all_zero_weight_gives_zeros():
    for backend in BACKENDS:
        for factor in (1.0, None):
            codes, x = np.zeros((4, 64), np.int8), np.ones((2, 64))
            got = product(backend, codes, np.full((4, 1), 1e-12), 4, x, factor, mx.float16)
            np.testing.assert_array_equal(got, 0)


@pytest.mark.parametrize("dtype", [mx.float32, *HALVES])
def test_unpacking_at_every_call_gives_what_unpacking_once_gives(dtype):
    codes, x = random_codes(0, (48, 1536), 8), random_inputs(0, (5, 1536), 8)
    scale, factor = np.full((48, 1), 1e-3), np.float32(0.02)
    once, anew = (product(b, codes, scale, 8, x, factor, dtype) for b in ("dense", "unpack"))
    np.testing.assert_array_equal(anew, once)


def test_unpacking_at_every_call_keeps_nothing_but_the_codes():
    weight = Weight(pack_codes(random_codes(0, (512, 1536), 4), 4), mx.ones((512, 1)), 4)
    mx.eval(weight.packed, weight.scales)
    before = mx.get_active_memory()
    operand = named("unpack").prepare(weight, mx.float32, LARGEST)
    y = named("unpack").multiply(mx.ones((3, 1536)), mx.array(1.0), operand)
    mx.eval(y, operand["scales"])
    assert mx.get_active_memory() - before < 0.1 * weight.packed.nbytes


def test_selection():
    cpu, m4, m5 = Device("cpu"), Device("metal", 16), Device("metal", 17)
    assert select(cpu, 4096, 1536, 1536).name == "dense"
    assert select(m4, 4096, 1536, 1536).name == "dense"
    assert select(m5, 4096, 1536, 1536).name == "quantized_matmul"
    assert select(m4, 1, 1536, 1536).name == "quantized_matmul"
    assert select(Device.here(), 64, 192, 192).name in BACKENDS
    for name in BACKENDS:
        assert named(name).name == name
    with pytest.raises(UserError, match="unknown kernel 'int5'; valid: reference, dense, unpack"):
        named("int5")


def test_impossible_weights_are_refused():
    with pytest.raises(UserError, match="7 bits cannot be packed; valid: 2, 3, 4, 5, 6, 8"):
        Weight(mx.zeros((4, 7), dtype=mx.uint32), mx.ones((4, 1)), 7)
    with pytest.raises(UserError, match="3 groups of scales do not divide 64 columns"):
        Weight(pack_codes(np.zeros((4, 64), np.int8), 4), mx.ones((4, 3)), 4)
